"""``python -m sfr_ext``: the same as ``sfr-ext``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
