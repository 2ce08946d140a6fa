"""How fast sfr_ext is, and how exact; README.md in this folder says which file does what."""

import os

# Before torch loads OpenMP, for everybody: threads that wait spin for some ten microseconds and then sleep. By default
# they spin for milliseconds, and where something else needs the core, calls take seconds instead of milliseconds.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
