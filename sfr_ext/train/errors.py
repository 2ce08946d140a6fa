"""The one exception that stands for a mistake of the user or a missing file, told in one sentence."""

from __future__ import annotations


class TrainError(Exception):
    """What went wrong and what would help, in one sentence; the command line prints it without a traceback."""


class UsageError(TrainError):
    """Options or values that nothing could make work; the command line ends with 2."""


class EveryProcessError(TrainError):
    """One that every process of the run meets at the same place; the first one tells it."""

    def told_here(self) -> bool:
        """Whether this is the process that tells it."""
        from .engine import process_rank

        return process_rank() == 0


class EveryProcessUsageError(EveryProcessError, UsageError):
    """Both."""
