"""Music metrics without networks: tempo, key, repetition, signal statistics, codec tokens."""
