"""Parts of `jobs/benchmark.py`."""
