"""Captions of segments."""
