"""The process of one run: its options come as a line on stdin, and the end of stdin is the end of the parent.

A parent that is killed cannot end its children, and runs that nobody waits for would hold their folders.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback

from ..train.errors import TrainError
from .work import from_json, reason, work


def main() -> int:
    config = from_json(json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(config)
    except TrainError as error:
        print(f"sfr-ext: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        traceback.print_exc()
        print(f"sfr-ext: {reason(error)}", file=sys.stderr)
        return 1
    return 0


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(130)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the thread above waits in a read, which an ordinary exit would wait for
