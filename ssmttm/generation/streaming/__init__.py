"""Streams in progress, and their states on disk."""
