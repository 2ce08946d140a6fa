"""The one exception that stands for a mistake of the user or a missing file, told in one sentence."""

from __future__ import annotations


class TrainError(Exception):
    """What went wrong and what would help; the command line prints it without a traceback."""
