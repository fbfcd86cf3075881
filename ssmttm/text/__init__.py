"""Frozen text encoders and the text condition they produce."""

from ssmttm.text.condition import TextCondition
from ssmttm.text.encoders import TextEncoder, load_text_encoder

__all__ = ["TextCondition", "TextEncoder", "load_text_encoder"]
