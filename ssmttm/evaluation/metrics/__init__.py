"""Metrics of generated audio: distances between embedding sets, KL, CLAP score, label accuracy, bootstrap intervals."""
