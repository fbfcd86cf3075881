"""Engines of the decoding step: torch is the reference, fused (C++) and ort (ONNX Runtime) are faster on a CPU.

Every engine steps on the memory of an LMState that torch has prefilled, so that states can be saved and copied whatever
runs the steps.
"""

from ssmttm.generation.engines.base import Engine, Steps
from ssmttm.generation.engines.choice import ENGINES, WEIGHTS, EngineCache, build, check_names, describe

__all__ = ["ENGINES", "WEIGHTS", "Engine", "EngineCache", "Steps", "build", "check_names", "describe"]
