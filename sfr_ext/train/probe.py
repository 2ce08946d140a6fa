"""``--probe``: how much of the classes a linear classifier finds in each layer's features.

A ridge regression onto the one-hot labels, which has a closed form: nothing to tune, and the same everywhere. Alain,
Bengio: "Understanding intermediate layers using linear classifier probes", 2016, train theirs by gradient descent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layouts import Transform
from ..sfr.features import features_of
from .figures import Evaluation
from .loader import Batch

IMAGES = 10_000  # training images that a probe is fitted to, at most
GRID = 2  # maps are averaged to so many rows and columns
RIDGE = 1e-3  # on features of variance 1


def probe(evaluation: Evaluation, layers: dict[str, Transform | None], num_classes: int) -> dict[str, float]:
    """Test accuracy of a probe of each layer, fitted to training images as they are, with the labels of the run."""
    data = evaluation.data
    train, labels = _features(evaluation, layers, data.plain_batches(IMAGES))
    test, truth = _features(evaluation, layers, data.test_batches())
    found = {}
    for name in layers:
        scores = ridge(train[name], labels, test[name], num_classes)
        found[name] = float((scores.argmax(1) == truth).double().mean())
    return found


def ridge(train: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """Scores ``[M, K]`` of features ``[M, D]``, by ``W = (X^T X / N + RIDGE)^-1 X^T Y / N``.

    ``X``: training features ``[N, D]``, each of mean 0 and variance 1; ``Y``: one-hot labels less their mean.
    """
    train, test = train.double(), test.double()
    mean, deviation = train.mean(0), train.std(0, correction=0)
    # A feature that never changes says nothing.
    scale = torch.where(deviation > 1e-9 * mean.abs().clamp(min=1e-30), 1 / deviation, 0.0)
    train, test = (train - mean) * scale, (test - mean) * scale
    classes = F.one_hot(labels, num_classes).double()
    share = classes.mean(0)
    gram = train.T @ train / len(train) + RIDGE * torch.eye(train.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, train.T @ (classes - share) / len(train))
    return test @ weight + share


def _features(
    evaluation: Evaluation, layers: dict[str, Transform | None], batches: Iterable[Batch]
) -> tuple[dict[str, Tensor], Tensor]:
    """Pooled features ``[N, D]`` by layer, and labels ``[N]``."""
    caught: dict[str, Any] = {}
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    labels = []

    def keep(name: str) -> Any:
        return lambda module, arguments, output: caught.__setitem__(name, output)

    handles = [evaluation.model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        for logits, found in evaluation.logits(batches):
            labels.append(found)
            for name, x in features_of("--probe", {name: caught[name] for name in layers}, layers).items():
                pooled = F.adaptive_avg_pool2d(x.float(), GRID) if x.dim() == 4 else x.float().mean(1)
                kept[name].append(pooled.flatten(1)[: len(logits)].cpu())
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}, torch.cat(labels)
