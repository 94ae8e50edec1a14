"""What scripts/bench_decode.py times, checks and prints."""
