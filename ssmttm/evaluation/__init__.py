"""How good is what a model makes: distances to real music, musical measures, adherence to prompts, protocols."""

from ssmttm.evaluation.metrics.distances import frechet_distance, kernel_distance

__all__ = ["frechet_distance", "kernel_distance"]
