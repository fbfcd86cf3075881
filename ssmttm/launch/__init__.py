"""Running jobs and tasks: processes of this machine, Slurm arrays, a Ray cluster."""
