"""From one command to all ranks of this machine; several nodes and sweeps get their own issue."""
