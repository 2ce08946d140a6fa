"""Bad input: the tests for the CPU, on the GPU."""

from test_errors import *  # noqa: F403
