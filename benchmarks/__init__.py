"""Comparisons: ``python -m benchmarks`` for speed, ``python -m benchmarks.excess`` for accuracy."""
