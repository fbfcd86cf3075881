"""How many samples an audio file really holds, by its container; decoders trust its header. Imports no torch."""
