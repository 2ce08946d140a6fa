"""The Python of the README and of the pages for users runs from top to bottom, as it stands."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from sfr_ext import cli
from sfr_ext.train.models import build_model

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    for number, code in enumerate(blocks(page), start=1):
        exec(compile(code, f"{page}, block {number}", "exec"), names)
    return names


def yours() -> dict[str, Any]:
    """What the README says is the reader's own."""
    torch.manual_seed(0)
    model, _ = build_model("resnet8", channels=1, num_classes=10)
    big_model, _ = build_model("resnet14", channels=1, num_classes=10)
    data = torch.utils.data.TensorDataset(torch.rand(32, 1, 16, 16), torch.randint(10, (32,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    return {"model": model, "big_model": big_model, "optimizer": optimizer, "loader": loader, "steps": 4}


def test_readme() -> None:
    names = run("README.md", yours())
    assert names["student"].grad.shape == (8, 64, 7, 7)
    assert float(names["smooth"].current) == pytest.approx(0.1)  # every step was told
    assert any(x.grad is not None for x in names["distiller"].parameters())
    assert names["nearest"].shape == (15,)


def test_the_readme_has_a_snippet_for_each_use() -> None:
    code = "\n".join(blocks("README.md"))
    for name in ("emd_l2", "SelfFeatureRegularizer", "FeatureDistiller", "cross_reference_weights"):
        assert name in code
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


@pytest.mark.parametrize("page", ["docs/features.md", "docs/guide.md", "docs/troubleshooting.md"])
def test_page(page: str) -> None:
    if page == "docs/features.md":
        pytest.importorskip("scipy")
    assert blocks(page)
    run(page, {})


def test_sfr_in_a_training_loop() -> None:
    torch.manual_seed(0)
    stages = {f"layer{k}": torch.nn.Conv2d(2 ** max(k - 1, 0), 2**k, 3, padding=1) for k in range(1, 5)}
    stages |= {"flatten": torch.nn.Flatten(), "fc": torch.nn.LazyLinear(10)}
    model = torch.nn.Sequential(OrderedDict(stages))
    model(torch.rand(1, 1, 8, 8))
    vit = torch.nn.ModuleDict({"blocks": torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(12)))})
    batches = [(torch.rand(4, 1, 8, 8), torch.randint(10, (4,))) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    names = run("docs/sfr.md", {"model": model, "vit": vit, "optimizer": optimizer, "batches": batches, "steps": 3})
    assert float(names["smooth"].current) == pytest.approx(0.1)
    vit["blocks"](torch.rand(2, 1 + 16, 6))
    assert names["sfr"].loss() > 0


def test_the_network_out_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of docs/troubleshooting.md on last.ckpt, with a run of its name."""
    for module in ("lightning", "jsonargparse", "sklearn"):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    quick = ["--limit", "64", "--batch-size", "32", "--epochs", "1", "--no-progress", "--accelerator", "cpu"]
    assert cli.main(["train", "--data", "digits", "--arm", "sfr", "--arch", "resnet8", *quick]) == 0
    section = (ROOT / "docs/troubleshooting.md").read_text().split("## The network out of a run")[1]
    code = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    names: dict[str, Any] = {"images": torch.rand(3, 1, 8, 8), "torch": torch}
    exec(compile(code, "docs/troubleshooting.md", "exec"), names)
    assert names["logits"].shape == (3, 10)
    again, _ = build_model("resnet8", channels=1, num_classes=10)
    again.load_state_dict(torch.load("network.pt"))
