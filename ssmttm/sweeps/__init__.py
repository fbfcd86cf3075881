"""Sweeps: a grid of trainings expanded, launched, collected, reported."""
