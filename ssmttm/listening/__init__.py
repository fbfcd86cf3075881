"""Listening tests: a page for listeners, an analyser for what they say, an export to webMUSHRA."""
