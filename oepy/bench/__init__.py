"""Benchmarks: each beside a named peer or the physical floor, in the same run."""
