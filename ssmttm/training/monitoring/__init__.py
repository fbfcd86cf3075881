"""Watching a training: stalls, profiles."""
