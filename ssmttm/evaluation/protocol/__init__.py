"""Evaluation protocols: prompts, generation, cached embeddings, metrics and the report."""
