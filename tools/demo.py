"""What `make demo` runs: the same network trained on real images without and with SFR, compared.

    python tools/demo.py [--out demo]

Fashion-MNIST where it can be had, else scikit-learn's digits. A demonstration of a few minutes, not a
study: two short runs with one seed cannot tell which method is better.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sfr_ext import build_info
from sfr_ext.train import fashion_mnist
from sfr_ext.train.errors import TrainError
from sfr_ext.train.plots import plot_curves
from sfr_ext.train.records import read_rows

FASHION = "--data fashion-mnist --limit 8000 --epochs 3 --batch-size 64 --no-augment".split()
DIGITS = "--data digits --epochs 15 --batch-size 64".split()


def main() -> int:
    parser = argparse.ArgumentParser(description="Train without and with SFR, and compare.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for what is written")
    out = parser.parse_args().out

    data = FASHION
    try:
        fashion_mnist.load(None)
    except TrainError as error:
        print(f"Fashion-MNIST cannot be had here, so this trains on scikit-learn's digits instead ({error}).")
        data = DIGITS

    begin = time.perf_counter()
    results = {arm: train(arm, data, out / arm) for arm in ("ce", "sfr")}
    plot_curves(out / "curves.png", {arm: read_rows(out / arm / "metrics.csv") for arm in results})

    print()
    for arm, name in (("ce", "cross-entropy"), ("sfr", "SFR")):
        result = results[arm]
        print(f"{name:>13}: test accuracy {100 * result['test_accuracy']:.2f} %, {result['seconds']:.0f} s")
    sfr = results["sfr"]
    share = 100 * sfr["emd_seconds"] / sfr["seconds"]
    print(f"The EMD loss took {sfr['emd_seconds']:.1f} s of SFR's time ({share:.0f} %), backward included.")
    print(f"Both trainings: {time.perf_counter() - begin:.0f} s. Short runs of one seed are no verdict.")
    print(f"Curves: {out / 'curves.png'}")
    return 0


def train(arm: str, data: list[str], out: Path) -> dict[str, Any]:
    """Run `sfr-ext train` as a process of its own; return its result.json."""
    arguments = ["train", "--arm", arm, "--arch", "resnet8", *data, "--out", str(out), "--overwrite", "--no-progress"]
    if not build_info()["cuda"]:
        arguments += ["--accelerator", "cpu"]
    print(f"\nsfr-ext {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "sfr_ext", *arguments], check=True)
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


if __name__ == "__main__":
    raise SystemExit(main())
