"""Functions that make a plan, usually from what probes found; one file each."""
