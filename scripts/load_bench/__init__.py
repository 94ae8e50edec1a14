"""What scripts/bench_server.py and scripts/bench_load.py are made of."""
