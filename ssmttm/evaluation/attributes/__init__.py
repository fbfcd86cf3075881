"""Attribute classifiers of lead instrument, tempo, key and mode, and prompt adherence measured with them."""
