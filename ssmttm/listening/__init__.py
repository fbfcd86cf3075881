"""Listening tests: a self-contained page, the analysis of its answers, an export to webMUSHRA."""
