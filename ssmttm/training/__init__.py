"""Training: one loop (`loop.train`), one task per kind of model (`lm`, `codec`)."""
