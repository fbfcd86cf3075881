"""The pure functions behind the stage `select`: duplicates, leakage from evaluation sets, splits."""
