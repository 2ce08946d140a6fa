"""Comparisons: ``python -m benchmarks`` for speed, ``.excess`` for accuracy, ``.cuda`` for speed on a GPU."""
