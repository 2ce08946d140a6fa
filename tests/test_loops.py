"""SFR in the loops that people have: each cell of the table in docs/integrations.md, with and without projections."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import in_two_processes, join, leave
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfr_ext import DynamicLabelSmoothing, SelfFeatureRegularizer

LAYERS = ["layer1", "layer2", "layer3"]
modes = pytest.mark.parametrize("mode", ["match", "project"])


class Net(nn.Module):
    """Without batch statistics, so that halves of a batch are what they are in the whole."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(16, 3)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.layer1, self.layer2, self.layer3):
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return self.fc(x.mean((2, 3)))


def batch(count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 3


def parts(mode: str, **options: Any) -> tuple[Net, SelfFeatureRegularizer]:
    """The same ones each time."""
    torch.manual_seed(0)
    net = Net(**options)
    sfr = SelfFeatureRegularizer(net, LAYERS, channel_mode=mode, attach=mode == "project", eps=0.1, tol=1e-6)
    net(batch()[0])  # makes the projections
    return net, sfr


def backward(net: nn.Module, sfr: SelfFeatureRegularizer, images: Tensor, labels: Tensor, share: float = 1.0) -> Tensor:
    loss = F.cross_entropy(net(images), labels) + sfr.loss()
    (loss * share).backward()
    return loss.detach()


def gradients(net: nn.Module, sfr: SelfFeatureRegularizer) -> dict[str, Tensor]:
    named = {**dict(net.named_parameters()), **{f"sfr.{name}": p for name, p in sfr.named_parameters()}}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in named.values())
    return {name: p.grad.clone() for name, p in named.items()}


def eager(mode: str, count: int = 4) -> tuple[Tensor, dict[str, Tensor]]:
    net, sfr = parts(mode)
    return backward(net, sfr, *batch(count)), gradients(net, sfr)


@modes
def test_accumulation_adds_up(mode: str) -> None:
    net, sfr = parts(mode)
    images, labels = batch()
    for half in (slice(0, 2), slice(2, 4)):
        backward(net, sfr, images[half], labels[half], share=0.5)
    torch.testing.assert_close(gradients(net, sfr), eager(mode)[1], rtol=1e-3, atol=1e-5)


@modes
def test_an_averaged_model(mode: str) -> None:
    """Its forwards disturb nothing, whenever they come."""
    net, sfr = parts(mode)
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    images, labels = batch()
    logits = net(images)
    with torch.no_grad():
        average(images.flip(0))
    (F.cross_entropy(logits, labels) + sfr.loss()).backward()
    ours = gradients(net, sfr)
    torch.testing.assert_close(ours, eager(mode)[1])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= 0.1 * parameter.grad
    average.update_parameters(net)  # copies parameters first, then averages
    before = average.module.layer1[0].weight.clone()
    with torch.no_grad():
        net.layer1[0].weight += 1
    average.update_parameters(net)
    torch.testing.assert_close(average.module.layer1[0].weight, before + 0.5)


@modes
def test_checkpointed_stages(mode: str) -> None:
    net, sfr = parts(mode, checkpointed=True)
    loss = backward(net, sfr, *batch())
    wanted, theirs = eager(mode)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradients(net, sfr), theirs)


@modes
def test_autocast_with_a_scaler(mode: str) -> None:
    net, sfr = parts(mode)
    images, labels = batch()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = net(images)
        loss = F.cross_entropy(logits, labels) + sfr.loss()
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    wanted, theirs = eager(mode)
    torch.testing.assert_close(loss, wanted, rtol=2e-2, atol=0)
    ours = gradients(net, sfr)
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() < 0.1 * gradient.norm(), name
    before = net.layer1[0].weight.clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(net.layer1[0].weight, before)


@modes
def test_compiled(mode: str) -> None:
    net, sfr = parts(mode)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    loss = backward(compiled, sfr, *batch())
    wanted, theirs = eager(mode)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradients(net, sfr), theirs)


def test_smoothing_steps_with_the_optimiser() -> None:
    """Of 6 batches, accumulated in pairs: 3 steps; the regulariser counts batches."""
    net, sfr = parts("match")
    smooth = DynamicLabelSmoothing(0.1, total_steps=30)
    for i in range(1, 7):
        (smooth(net(batch()[0]), batch()[1]) + sfr.loss()).backward()
        if i % 2 == 0:
            smooth.step()
    assert smooth.current == pytest.approx(0.01) and int(sfr.steps) == 6


# Several processes


def _one_of_two(rank: int, folder: Path, mode: str, wrapper: str) -> None:
    join(rank, folder)
    net, sfr = parts(mode)
    images, labels = batch()
    if wrapper == "ddp":
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(net)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in (net.layer1, net.layer2, net.layer3):
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(net, mesh=mesh)
    loss = F.cross_entropy(wrapped(images[rank::2]), labels[rank::2]) + sfr.loss()
    loss.backward()
    full = {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for name, p in net.named_parameters()
    }
    leave(full, rank, folder)


class Owner(nn.Module):
    """Is wrapped with both in it."""

    def __init__(self, net: Net, sfr: SelfFeatureRegularizer) -> None:
        super().__init__()
        self.net, self.sfr = net, sfr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def _warned(rank: int, folder: Path, wrapper: str) -> None:
    join(rank, folder)
    told = {}
    images, _ = batch()
    for how in ("alone", "attached", "owned", "match", "not wrapped"):
        net = Net()
        mode = "match" if how == "match" else "project"
        sfr = SelfFeatureRegularizer(net, LAYERS, channel_mode=mode, attach=how == "attached")
        net(images)
        outer = Owner(net, sfr) if how == "owned" else net
        if how == "not wrapped":
            wrapped: nn.Module = net
        elif wrapper == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(outer)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            wrapped = fully_shard(outer, mesh=init_device_mesh("cpu", (2,)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                (wrapped(images).sum() + sfr.loss()).backward()
        ours = [warning for warning in caught if "each has projections of its own" in str(warning.message)]
        assert all(warning.filename == __file__ for warning in ours)
        told[how] = len(ours)
        del wrapped, outer, net, sfr
    leave(told, rank, folder)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_projections_of_one_process_alone_are_told(wrapper: str, tmp_path: Path) -> None:
    """Once; not where they are wrapped with the model."""
    if wrapper == "fsdp2" and not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    for told in in_two_processes(_warned, tmp_path, wrapper):
        assert told == {"alone": 1, "attached": 0, "owned": 0, "match": 0, "not wrapped": 0}


@modes
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_processes(wrapper: str, mode: str, tmp_path: Path) -> None:
    if wrapper == "fsdp2" and not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    first, second = in_two_processes(_one_of_two, tmp_path, mode, wrapper)
    assert all(torch.equal(first[name], second[name]) for name in first)

    net, sfr = parts(mode)
    images, labels = batch()
    for rank in range(2):
        backward(net, sfr, images[rank::2], labels[rank::2], share=0.5)
    torch.testing.assert_close(first, {name: p.grad for name, p in net.named_parameters()}, rtol=1e-3, atol=1e-5)
