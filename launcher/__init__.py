"""From one command to all ranks: of this machine, of several that are reached by ssh, or of a Slurm job."""
