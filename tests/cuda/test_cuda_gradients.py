"""Gradients: the tests for the CPU, on the GPU."""

from test_gradients import *  # noqa: F403
