"""`python -m gpu_model`: what a GPU would make of the kernels; docs/gpu-model.md holds what it says.

code: the kernels' hot loops in machine code, against tools/gpu_model/budgets.toml. counters: what lines take of shared
and global memory, on the emulator. predict: how long workloads would take; `--measure` compares with the GPU that is
here. docs: writes all three into docs/gpu-model.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cuda_toolchain import NoCuda

from . import code
from .devices import DEVICES
from .flow import NoPath
from .hot_loops import table
from .machine_code import NoDisassembler

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu-model.md"


def write_page(sections: dict[str, str]) -> None:
    """Replaces what stands between the markers of each section."""
    text = PAGE.read_text()
    for name, content in sections.items():
        begin, end = f"<!-- gpu_model: {name} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"gpu_model: {PAGE.name} has no section {begin} ... {end}")
        text = f"{before}{begin}\n\n{content}\n\n{end}{after}"
    PAGE.write_text(text)


def over_budget(arch: str) -> list[str]:
    return [line for m in [*code.of_loops(arch), *code.of_kernels(arch)] for line in m.over]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_model", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["code", "counters", "predict", "docs"])
    parser.add_argument("--arch", default=table()["arch"], help="compute capability of the machine code, as 90")
    parser.add_argument("--device", choices=list(DEVICES), action="append", help="of predictions; all")
    parser.add_argument("--measure", action="store_true", help="compare predictions with the GPU that is here")
    options = parser.parse_args()
    try:
        return run(options)
    except (NoCuda, NoDisassembler, NoPath) as error:
        print(f"gpu_model: {error}", file=sys.stderr)
        return 1


def run(options: argparse.Namespace) -> int:
    from . import counters, predict

    devices = options.device or list(DEVICES)
    if options.what == "counters":
        print(counters.report())
        return 0
    if options.what == "predict":
        print(predict.report(devices, options.measure))
        print("\nAssumed:\n\n" + predict.ASSUMED)
        return 0
    over = over_budget(options.arch)
    if options.what == "code":
        print(code.report(options.arch))
    else:
        share = predict.breakdown(predict.WORKLOADS[0], DEVICES["H100"])
        write_page({
            "code": code.report(options.arch),
            "counters": counters.report(),
            "predictions": predict.report(devices),
            "share": share,
            "assumptions": predict.ASSUMED,
        })  # fmt: skip
    for line in over:
        print(f"gpu_model: over budget: {line}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
