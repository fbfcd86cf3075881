"""Codecs of two channels that are made from a mono codec."""
