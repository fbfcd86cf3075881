"""Training: one loop (`loop.train`) and one task per kind of model (`tasks`)."""
