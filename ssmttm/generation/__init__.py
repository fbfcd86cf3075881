"""From prompt to audio: the sampling engine, logit filters, the second stage and the pipeline."""
