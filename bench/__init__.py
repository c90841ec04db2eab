"""Benchmarks of qkernels and its peers: see docs/benchmarks.md, or `python -m bench --help`."""
