"""Frozen text encoders and the condition that they hand to a model."""

from ssmttm.text.condition import TextCondition
from ssmttm.text.encoders import TextEncoder, load_text_encoder

__all__ = ["TextCondition", "TextEncoder", "load_text_encoder"]
