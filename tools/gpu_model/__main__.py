"""`python -m gpu_model code`: the kernels' hot loops in machine code, against tools/gpu_model/budgets.toml."""

from __future__ import annotations

import argparse
import sys

from cuda_toolchain import NoCuda

from . import code
from .hot_loops import table
from .machine_code import NoDisassembler


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_model", description="What a GPU would make of the CUDA kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    of_code = commands.add_parser("code", help="instructions and modelled clocks of the hot loops, and their budgets")
    of_code.add_argument("--arch", default=table()["arch"], help="compute capability, as 90")
    options = parser.parse_args()
    try:
        print(code.report(options.arch))
        over = [line for m in [*code.of_loops(options.arch), *code.of_kernels(options.arch)] for line in m.over]
    except (NoCuda, NoDisassembler) as error:
        print(f"gpu_model: {error}", file=sys.stderr)
        return 1
    for line in over:
        print(f"gpu_model: over budget: {line}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
