"""The code of docs/integrations.md, run as it stands; what the Trainer of Hugging Face does with it."""

from __future__ import annotations

import copy
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import sfr_ext
from sfr_ext import layouts
from sfr_ext.train.models import build_model
from sfr_ext.train.optional import import_optional

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "integrations.md").read_text()
NEEDS = {"Lightning": ("lightning",), "Hugging Face Trainer": ("transformers", "accelerate")}
HEADINGS = re.findall(r"^## (.+)$", PAGE, re.M)


def blocks(heading: str) -> list[str]:
    section = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```", section[1], re.M | re.S)


def scope(tmp_path: Path) -> dict[str, Any]:
    """What the page says is there."""
    model, _ = build_model("resnet8", channels=1, num_classes=10)
    data = torch.utils.data.TensorDataset(torch.rand(32, 1, 16, 16), torch.randint(10, (32,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    return {"model": model, "loader": loader, "steps": 4, "torch": torch, "sfr_ext": sfr_ext, "folder": str(tmp_path)}


def run(heading: str, tmp_path: Path, with_a_copy: bool = False) -> dict[str, Any]:
    """The page's code of one section; with a copy, ``plain`` is the model as it was before."""
    names = scope(tmp_path)
    if with_a_copy:
        names["plain"] = copy.deepcopy(names["model"])
    # Which a torchvision of another torch, or none, keeps from being imported.
    for module in re.findall(r"from ((?:timm|torchdistill)[\w.]*) import", "\n".join(blocks(heading))):
        if (reason := import_optional(module)[1]) is not None:
            pytest.skip(reason)
    for package in ("lightning", "transformers", "accelerate"):
        if re.search(
            rf"(?:import|from) {package if package != 'accelerate' else 'transformers'}\b", str(blocks(heading))
        ):
            pytest.importorskip(package)
    for code in blocks(heading):
        exec(compile(code, f"docs/integrations.md, {heading}", "exec"), names)
    return names


def test_sections_with_code() -> None:
    assert [heading for heading in HEADINGS if blocks(heading)] == [
        "A loop of your own",
        "Lightning",
        "Hugging Face Trainer",
        "timm's task",
        "torchdistill",
    ]


def test_a_loop_of_your_own(tmp_path: Path) -> None:
    names = run("A loop of your own", tmp_path)
    assert int(names["smooth"].steps) == 4 + 2 and int(names["sfr"].steps) == 4 + 4
    assert set(names["state"]["sfr"]) == {"steps"} == set(names["state"]["smooth"])
    assert int(names["average"].n_averaged) == 2


def test_lightning(tmp_path: Path) -> None:
    names = run("Lightning", tmp_path)
    assert int(names["trainer"].model.smooth.steps) == 4
    assert int(names["callback"].state_dict()["steps"]) == 4


def test_hugging_face_trainer(tmp_path: Path) -> None:
    """Both counters are saved beside each checkpoint: steps of the optimiser, and batches."""
    names = run("Hugging Face Trainer", tmp_path)
    assert int(names["smooth"].steps) == 4 and int(names["sfr"].steps) == 8
    saved = torch.load(tmp_path / "checkpoint-2" / "sfr-0.pt")
    assert int(saved["smooth"]["steps"]) == 2 and int(saved["sfr"]["steps"]) == 4


def test_hugging_face_trainer_resumes(tmp_path: Path) -> None:
    """As if it had not stopped. Of a network without the names of other versions, which its checkpoints translate."""
    names = run("Hugging Face Trainer", tmp_path / "page")
    from transformers import TrainingArguments
    from transformers.modeling_outputs import ImageClassifierOutput

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.network, _ = build_model("resnet8", channels=1, num_classes=10)

        def forward(self, pixel_values, labels):
            return ImageClassifierOutput(loss=torch.zeros(()), logits=self.network(pixel_values))

    ended = []
    first = str(tmp_path / "a" / "checkpoint-2")
    for folder, resumed in (("a", None), ("a", True), ("a", first), ("b", first)):  # also with another output_dir
        if resumed is True:
            shutil.rmtree(tmp_path / "a" / "checkpoint-4")
        model = Plain()
        sfr = sfr_ext.SelfFeatureRegularizer(model, ["network.layer1", "network.layer2"], warmup_steps=20)
        smooth = sfr_ext.DynamicLabelSmoothing(0.5, total_steps=4)
        arguments = TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=4,
            save_steps=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = names["SFRTrainer"](model, arguments, train_dataset=names["data"], sfr=sfr, smooth=smooth)
        trainer.train(resume_from_checkpoint=resumed)
        assert int(smooth.steps) == 4 and int(sfr.steps) == 8
        ended.append([p.detach().clone() for p in model.parameters()])
        torch.testing.assert_close(ended[-1], ended[0])


def test_hugging_face_counters_of_fewer_processes(tmp_path: Path) -> None:
    """A process that saved nothing takes what the first one has saved. (The page's code, without a Trainer.)"""
    source = re.search(r"class SFRState.*?(?=^class SFRMixin)", "\n".join(blocks("Hugging Face Trainer")), re.M | re.S)
    names: dict[str, Any] = {"TrainerCallback": object, "torch": torch, "os": os}
    exec(source[0], names)
    smooth = sfr_ext.DynamicLabelSmoothing(0.5, total_steps=4)
    (tmp_path / "checkpoint-2").mkdir()
    smooth.step()
    torch.save({"smooth": smooth.state_dict()}, tmp_path / "checkpoint-2" / "sfr-0.pt")
    state = names["SFRState"](None, other := sfr_ext.DynamicLabelSmoothing(0.5, total_steps=4))
    state.parts.pop("sfr")
    arguments = SimpleNamespace(output_dir="elsewhere", process_index=3, device="cpu")
    state.resumed = str(tmp_path / "checkpoint-2")
    state.on_train_begin(arguments, SimpleNamespace(global_step=2), None)
    assert int(other.steps) == 1


def test_hugging_face_trainer_honours_accumulation(tmp_path: Path) -> None:
    """Two batches of 4, accumulated, are one of 8: the losses are means over images."""
    names = run("Hugging Face Trainer", tmp_path)
    weights = []
    for size, accumulate in ((4, 2), (8, 1)):
        torch.manual_seed(0)
        vit = type(names["vit"])(names["vit"].config)
        sfr = sfr_ext.SelfFeatureRegularizer(
            vit, dict.fromkeys(names["blocks"], layouts.tokens()), eps=0.1, tol=1e-6, weight=3.0
        )
        smooth = sfr_ext.DynamicLabelSmoothing(0.1, total_steps=4)
        arguments = names["TrainingArguments"](
            str(tmp_path / str(size)),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            save_strategy="no",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        names["SFRTrainer"](vit, arguments, train_dataset=names["data"], sfr=sfr, smooth=smooth).train()
        assert int(smooth.steps) == 2
        weights.append([p.detach().clone() for p in vit.parameters()])
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_mixin_is_short() -> None:
    (code, *_) = blocks("Hugging Face Trainer")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 40 + 3  # with the imports


def test_evaluation_is_the_models_own(tmp_path: Path) -> None:
    names = run("Hugging Face Trainer", tmp_path)
    steps = int(names["sfr"].steps)
    metrics = names["trainer"].evaluate(names["data"])
    assert isinstance(names["vit"], nn.Module) and metrics["eval_loss"] > 0 and int(names["sfr"].steps) == steps


def plain_steps(names: dict[str, Any], loss: Any) -> list[torch.Tensor]:
    """The weights of the page's model after plain steps with that loss, without momentum."""
    model = names["plain"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for images, labels in names["loader"]:
        optimizer.zero_grad()
        loss(model, images, labels).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def test_timms_task(tmp_path: Path) -> None:
    """The steps are those of a plain loop; validation is left alone."""
    names = run("timm's task", tmp_path, with_a_copy=True)
    assert int(names["smooth"].steps) == 4 == int(names["sfr"].steps) and names["result"]["sfr"] > 0
    sfr = sfr_ext.SelfFeatureRegularizer(names["plain"], ["layer1", "layer2", "layer3"])
    smooth = sfr_ext.DynamicLabelSmoothing(0.1, total_steps=4)

    def loss(model, images, labels):
        value = smooth(model(images), labels) + sfr.loss()
        smooth.step()
        return value

    for ours, theirs in zip(names["model"].parameters(), plain_steps(names, loss), strict=True):
        torch.testing.assert_close(ours, theirs)
    names["task"].eval()
    with torch.no_grad():
        assert set(names["task"](torch.rand(2, 1, 16, 16), torch.tensor([0, 1]))) == {"loss", "output"}
    assert int(names["sfr"].steps) == 4


def test_torchdistill(tmp_path: Path) -> None:
    """The steps are those of a plain loop."""
    names = run("torchdistill", tmp_path, with_a_copy=True)
    features: dict[str, torch.Tensor] = {}
    for name in ("layer1", "layer2", "layer3"):
        getattr(names["plain"], name).register_forward_hook(
            lambda module, arguments, output, name=name: features.__setitem__(name, output)
        )

    def loss(model, images, labels):
        entropy = nn.functional.cross_entropy(model(images), labels)
        return entropy + sfr_ext.self_feature_loss(features, pairs="last")

    for ours, theirs in zip(names["model"].parameters(), plain_steps(names, loss), strict=True):
        torch.testing.assert_close(ours, theirs)
