"""Evaluation of generated music: metrics, embedders, music analysis, attribute classifiers, protocols."""

from ssmttm.evaluation.metrics.frechet import frechet_distance
from ssmttm.evaluation.metrics.kernel import kernel_distance

__all__ = ["frechet_distance", "kernel_distance"]
