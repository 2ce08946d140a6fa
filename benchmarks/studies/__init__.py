"""Questions of accuracy and convergence, each a command of its own: ``python -m benchmarks.studies.<name>``."""
