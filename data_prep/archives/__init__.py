"""WebDataset archives, out and in."""
