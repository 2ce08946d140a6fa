"""Values, plans and potentials: the tests for the CPU, on the GPU."""

from test_emd_values import *  # noqa: F403
