"""Compression of a whole system: language model, text encoder and codec decoder."""
