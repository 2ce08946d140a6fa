"""What becomes of a command whose output nobody reads on, as with ``| head``."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from typing import TextIO


def quietly(command: Callable[[], int]) -> int:
    """The command's exit code; 1 and no traceback where it wrote to a pipe whose reader has gone."""
    try:
        try:
            return command()
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except BrokenPipeError:
        broken = [stream for stream in (sys.stdout, sys.stderr) if _has_lost_its_reader(stream)]
        if not broken:  # a pipe of the command's own
            raise
        # Python flushes once more as it ends (docs.python.org/3/library/signal.html#note-on-sigpipe).
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in broken:
            os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return 1


def _has_lost_its_reader(stream: TextIO | None) -> bool:
    if stream is None:
        return False
    poll = select.poll()
    poll.register(stream.fileno(), 0)  # these two are told all the same
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
