"""Ground costs: the tests for the CPU, on the GPU."""

from test_cost_matrix import *  # noqa: F403
