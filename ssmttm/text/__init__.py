"""Frozen text encoders and the condition that they hand to a model."""
