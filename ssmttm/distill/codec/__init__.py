"""Distillation of codec decoders."""
