"""The registered operators and torch.compile: the tests for the CPU, on the GPU."""

from test_operators import *  # noqa: F403
