"""From a prompt to audio: logit filters, the prefill / step engine, and the pipeline around them."""
