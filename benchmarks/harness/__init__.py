"""What every table stands on: clocks, limits, checking, timing, reporting. Knows no table."""
