"""A whole system made small: students of its language model, text encoder and codec decoder, in one folder."""
