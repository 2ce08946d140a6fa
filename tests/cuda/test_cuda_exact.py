"""The exact solver: the tests for the CPU, on the GPU."""

from test_exact import *  # noqa: F403
