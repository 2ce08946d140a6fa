"""Other inputs with every seed, for as long as FUZZ_SECONDS says (an hour): ``make fuzz``.

Each pass runs tests/fuzz with a seed of its own; a failure is printed with the smallest input of its kind and with the
seed that finds it again. Ends with 1 if there was any.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

LENGTH = float(os.environ.get("FUZZ_SECONDS", 3600))
OPTIONS = ["-q", "--no-header", "-p", "no:cacheprovider", "--hypothesis-profile=long"]


def main() -> int:
    seed, failures, start = int(time.time()), 0, time.monotonic()
    while time.monotonic() - start < LENGTH:
        seed += 1
        command = [sys.executable, "-m", "pytest", *OPTIONS, f"--hypothesis-seed={seed}", "tests/fuzz"]
        done = subprocess.run(command, capture_output=True, text=True)
        print(f"seed {seed}: {done.stdout.strip().splitlines()[-1]}", flush=True)
        if done.returncode != 0:
            failures += 1
            print(done.stdout, done.stderr, sep="\n", flush=True)
    print(f"{failures} passes failed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
