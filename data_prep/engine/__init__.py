"""The engine: work in shards, each whole or absent, run by processes, a Slurm array or Ray."""
