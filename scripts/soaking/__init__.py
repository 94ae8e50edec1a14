"""What scripts/soak.py runs: random programs, the servers that they run against, and what must hold."""
