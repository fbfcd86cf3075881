"""How many samples an audio file really holds, by its container; decoders believe its header. Imports no torch."""
