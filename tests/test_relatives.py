"""The arms that other papers propose: each loss against a plain loop, and each arm through an interruption."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("lightning", reason="the extra [train] is not installed")
pytest.importorskip("matplotlib", reason="the extra [train] is not installed")
pytest.importorskip("sklearn", reason="the extra [train] is not installed")

import kill_runs

from sfr_ext.train.config import ARMS, LAST_CHECKPOINT, TrainConfig
from sfr_ext.train.errors import TrainError
from sfr_ext.train.mixing import cutmix
from sfr_ext.train.module import Classifier
from sfr_ext.train.relatives.byot import OwnTeacher
from sfr_ext.train.relatives.cskd import ClassWise, partners
from sfr_ext.train.relatives.ols import OnlineSmoothing
from sfr_ext.train.relatives.pskd import PastPredictions
from sfr_ext.train.relatives.tfd import SquaredError
from sfr_ext.train.relatives.tfkd import TeacherFree
from sfr_ext.train.run import run

pytestmark = pytest.mark.usefixtures("one_thread")

LOGITS = torch.tensor([[1.0, -0.5, 0.3], [0.2, 0.9, -1.0], [-0.4, 0.1, 0.8], [0.0, 2.0, 1.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 2, 2, 0])
IMAGES = torch.zeros(4, 1, 4, 4, dtype=torch.float64)


def softmax(row, temperature=1.0):
    e = [math.exp(x / temperature) for x in row]
    return [x / sum(e) for x in e]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def cross_entropy(rows=None):
    rows = LOGITS.tolist() if rows is None else rows
    return mean(-math.log(softmax(row)[y]) for row, y in zip(rows, LABELS.tolist(), strict=True))


# The losses


def test_tfkd():
    loss, feature = TeacherFree(share=0.3, temperature=2.0)(IMAGES, LOGITS, LABELS)
    expected = 0.7 * cross_entropy()
    for row, y in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        teacher = softmax([0.99 if k == y else 0.005 for k in range(3)], 2.0)
        expected += 0.3 * kl(teacher, softmax(row)) / 4
    assert float(loss) == pytest.approx(expected, rel=1e-7) and float(feature) == 0


def test_cskd():
    logits = LOGITS.clone().requires_grad_()
    loss, feature = ClassWise(weight=0.7, temperature=4.0)(IMAGES, logits, LABELS)
    rows = LOGITS.tolist()
    partner = [3, 2, 1, 0]
    consistency = mean(16 * kl(softmax(rows[partner[i]], 4), softmax(rows[i], 4)) for i in range(4))
    assert float(loss.detach()) == pytest.approx(cross_entropy() + 0.7 * consistency, rel=1e-9) and float(feature) == 0
    # No gradient through the partner: (q - p) T, each sample for itself.
    (gradient,) = torch.autograd.grad(loss, logits)
    for i in range(4):
        for k in range(3):
            own = softmax(rows[i])[k] - int(k == LABELS[i])
            pulled = 0.7 * 4 * (softmax(rows[i], 4)[k] - softmax(rows[partner[i]], 4)[k])
            assert float(gradient[i, k]) == pytest.approx(float(own + pulled) / 4, abs=1e-12)


def test_partners_go_around_in_their_class():
    assert partners(torch.tensor([5, 1, 5, 0, 5, 1])).tolist() == [2, 5, 4, 3, 0, 1]
    labels = torch.randint(4, (50,))
    found = partners(labels)
    assert torch.equal(labels[found], labels) and torch.equal(found.sort().values, torch.arange(50))


def test_pskd():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    images = torch.randn(4, 1, 4, 4, dtype=torch.float64)
    relative = PastPredictions(epochs=5, share=0.8)
    relative.begin_epoch(0, model)
    assert float(relative(images, LOGITS, LABELS)[0]) == pytest.approx(cross_entropy())
    past = model(images).softmax(1).tolist()
    relative.begin_epoch(2, model)
    with torch.no_grad():
        model[1].weight.zero_()  # what is learnt in this epoch is not the past
    alpha = 0.8 * 3 / 5
    expected = 0.0
    for row, y, before in zip(LOGITS.tolist(), LABELS.tolist(), past, strict=True):
        target = [(1 - alpha) * (k == y) + alpha * before[k] for k in range(3)]
        expected -= sum(t * math.log(p) for t, p in zip(target, softmax(row), strict=True)) / 4
    assert float(relative(images, LOGITS, LABELS)[0]) == pytest.approx(expected, rel=1e-9)
    assert not relative.state_dict() and not list(relative.parameters())


def test_ols():
    relative = OnlineSmoothing(3, share=0.4).double()
    relative.begin_epoch(0, nn.Identity())
    rows = LOGITS.tolist()
    uniform = mean(-sum(math.log(p) for p in softmax(row)) / 3 for row in rows)
    loss, feature = relative(IMAGES, LOGITS, LABELS)
    assert float(loss) == pytest.approx(0.4 * cross_entropy() + 0.6 * uniform, rel=1e-7) and float(feature) == 0
    relative(IMAGES, LOGITS.flip(1), LABELS)  # a second batch of the epoch: other rows are hits
    relative.begin_epoch(1, nn.Identity())
    hits = [
        row
        for row, y in zip([*rows, *LOGITS.flip(1).tolist()], [*LABELS.tolist()] * 2, strict=True)
        if row.index(max(row)) == y
    ]
    of_class = {c: [softmax(row) for row in hits if row.index(max(row)) == c] for c in range(3)}
    assert [len(of_class[c]) for c in range(3)] == [1, 0, 1]
    targets = [[mean(p[k] for p in of_class[c]) if of_class[c] else 1 / 3 for k in range(3)] for c in range(3)]
    expected = 0.4 * cross_entropy()
    for row, y in zip(rows, LABELS.tolist(), strict=True):
        expected -= 0.6 / 4 * sum(t * math.log(p) for t, p in zip(targets[y], softmax(row), strict=True))
    assert float(relative(IMAGES, LOGITS, LABELS)[0]) == pytest.approx(expected, rel=1e-9)


class TwoStages(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Conv2d(1, 2, 3, padding=1)
        self.layer2 = nn.Conv2d(2, 5, 3, 2, padding=1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(x).relu()).mean((2, 3)))


def test_byot():
    model = TwoStages().train()
    images = torch.randn(4, 1, 8, 8)
    relative = OwnTeacher(model, {"layer1": None, "layer2": None}, images[0], 3, share=0.3, temperature=2.0, hint=0.01)
    assert model.training and len(relative.heads) == 1
    logits = model(images)
    loss, feature = relative(images, logits, LABELS)
    with torch.no_grad():
        shallow = model.layer1(images)
        deep = model.layer2(shallow.relu())
        own, found = relative.heads[0](shallow)
    last = deep.mean((2, 3))
    hint = mean(
        sum((a - b) ** 2 for a, b in zip(*rows, strict=True)) for rows in zip(own.tolist(), last.tolist(), strict=True)
    )
    assert float(feature) == pytest.approx(0.01 * hint, rel=1e-4)
    entropies = cross_entropy(logits.tolist()) + cross_entropy(found.tolist())
    divergence = mean(
        4 * kl(softmax(p, 2), softmax(q, 2)) for p, q in zip(logits.tolist(), found.tolist(), strict=True)
    )
    assert float(loss) == pytest.approx(0.7 * entropies + 0.3 * divergence, rel=1e-5)
    # The last classifier learns from the labels alone.
    gradient = torch.autograd.grad(loss, model.fc.weight, retain_graph=True)[0]
    alone = torch.autograd.grad(0.7 * F.cross_entropy(logits, LABELS), model.fc.weight)[0]
    assert torch.allclose(gradient, alone, atol=1e-7)
    # The deep features are not drawn to the shallow ones.
    drawn = torch.autograd.grad(feature, (model.layer1.weight, model.layer2.weight), allow_unused=True)
    assert drawn[0].abs().max() > 0 and drawn[1] is None
    relative.remove()


def test_tfd():
    model = TwoStages().double()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    with SquaredError(model, ["layer1", "layer2"], channel_mode="crop", normalize=False) as regularizer:
        model(images)
        value = float(regularizer.loss())
        shallow = model.layer1(images)
        deep = model.layer2(shallow.relu())
        expected = mean(
            (float(shallow[b, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean()) - float(deep[b, c, i, j])) ** 2
            for b in range(2)
            for c in range(2)
            for i in range(4)
            for j in range(4)
        )
    assert value == pytest.approx(expected, rel=1e-9)


def test_cutmix():
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 2, 8, 10).clone()  # each image its number
    labels = torch.arange(6) % 3
    cut, shares = 0, []
    for step in range(200):
        mixed, soft = cutmix(images, labels, 3, (0, step))
        assert torch.allclose(soft.sum(1), torch.ones(6))
        if torch.equal(mixed, images):
            assert torch.equal(soft, F.one_hot(labels, 3).float())
            continue
        cut += 1
        for i in range(6):
            others = mixed[i].unique().tolist()
            assert len(others) <= 2 and torch.equal(mixed[i, 0], mixed[i, 1])
            own = float((mixed[i] == i).float().mean())
            partner = next((int(x) for x in others if x != i), i)
            expected = own * F.one_hot(labels[i], 3) + (1 - own) * F.one_hot(labels[partner], 3)
            assert torch.allclose(soft[i], expected.float(), atol=1e-6)
            if partner != i:
                shares.append(1 - own)
                rows, columns = torch.nonzero(mixed[i, 0] != i, as_tuple=True)
                area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
                assert area == len(rows)  # a box
    assert 70 <= cut <= 130  # half of the batches
    assert 0.2 < np.mean(shares) < 0.5 and max(shares) > 0.5


# Whole runs

MORE = {
    "sfr, projected": {"arm": "sfr", "channel_mode": "project"},
    "sfr, entropic": {"arm": "sfr", "solver": "sinkhorn"},
    "sfr, divergence": {"arm": "sfr", "solver": "sinkhorn", "objective": "divergence"},
}


@pytest.mark.parametrize("name", [*ARMS, *MORE])
def test_every_arm_is_resumed_to_the_same_bits(name, tmp_path):
    """Two steps an epoch, stopped in the last of three."""
    few = {"data": "digits", "limit": 128, "batch_size": 64, "epochs": 3, "progress": False, "tensorboard": False}
    config = TrainConfig(**{**few, **MORE.get(name, {"arm": name}), "out": tmp_path / "parts"})
    run(replace(config, out=tmp_path / "whole"))
    step = Classifier.training_step

    def breaks(self, batch, index):
        if self.current_epoch == 2:
            raise KeyError("power cut")
        return step(self, batch, index)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(Classifier, "training_step", breaks)
        run(config)
    run(replace(config, resume=config.out / LAST_CHECKPOINT))
    parts, whole = (kill_runs.end_of(tmp_path / part) for part in ("parts", "whole"))
    assert kill_runs.same(parts, whole)


@pytest.mark.parametrize("arm", ["tfd", "byot", "pskd", "cskd", "tfkd", "ols", "cutmix"])
def test_relatives_begin_as_ce_and_end_elsewhere(arm, tmp_path):
    """The same weights at the start: what they end with differs by the loss alone."""
    few = {"data": "digits", "limit": 128, "batch_size": 64, "epochs": 2, "progress": False, "tensorboard": False}
    ends = {}
    for name, rate in ((arm, 1e-12), ("ce", 1e-12), (f"{arm}, trained", 0.1), ("ce, trained", 0.1)):
        config = TrainConfig(**few, arm=name.split(",")[0], lr=rate, weight_decay=0.0, out=tmp_path / name)
        run(config)
        state = torch.load(config.out / LAST_CHECKPOINT, weights_only=True)["state_dict"]
        ends[name] = {k: x for k, x in state.items() if k.startswith("model.") and "running" not in k}
    assert all(torch.allclose(x, ends["ce"][k], atol=1e-6) for k, x in ends[arm].items())
    assert not all(torch.allclose(x, ends["ce, trained"][k], atol=1e-4) for k, x in ends[f"{arm}, trained"].items())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"arm": "ce", "distill": 0.5}, "--distill is for --arm byot, pskd, cskd, tfkd, ols, got it with --arm ce"),
        ({"arm": "pskd", "temperature": 3.0}, "--temperature is for --arm byot, cskd, tfkd, got it with --arm pskd"),
        ({"arm": "pskd", "distill": 1.5}, "--distill must be a share, in .0, 1., for --arm pskd, got 1.5"),
        ({"arm": "cskd", "mixup": 0.2}, "--mixup mixes labels"),
        ({"arm": "cutmix", "mixup": 0.2}, "--mixup mixes labels"),
    ],
)
def test_options_that_do_not_fit(options, told):
    with pytest.raises(TrainError, match=told):
        TrainConfig(**options)


def test_byot_needs_maps(tmp_path):
    few = {"data": "digits", "limit": 128, "batch_size": 64, "epochs": 1, "progress": False, "tensorboard": False}
    with pytest.raises(TrainError, match="layer9"):
        run(TrainConfig(**few, arm="byot", layers=("layer1", "layer9"), out=tmp_path))
