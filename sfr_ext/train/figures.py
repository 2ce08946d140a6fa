"""What a finished network is worth on the test images: accuracy, likelihood, calibration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TrainConfig
from .loader import IGNORED, Batch, ImageModule

BINS = 15  # of the calibration error, as in Guo et al. 2017


class Evaluation:
    """The network in evaluation mode on one device, over whole parts of the data, in the run's precision."""

    def __init__(self, config: TrainConfig, model: nn.Module, data: ImageModule, device: torch.device) -> None:
        self.model = model.to(device).eval()
        self.data = data
        self.device = device
        # A network without parameters takes float32.
        self.dtype = next(model.parameters(), torch.empty(0)).dtype
        self.mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(config.precision)

    @torch.no_grad()
    def logits(self, batches: Iterable[Batch]) -> Iterable[tuple[Tensor, Tensor]]:
        """Logits ``[B, K]`` in float32 and labels ``[B]`` of each batch, on the CPU."""
        for batch in batches:
            images, labels = self.data.on_before_batch_transfer(batch, 0)
            with torch.autocast(self.device.type, self.mixed) if self.mixed else contextlib.nullcontext():
                logits = self.model(self.data.normalised(images.to(self.device), self.dtype))
            real = labels != IGNORED
            yield logits.float().cpu()[real], labels[real]


def final_figures(evaluation: Evaluation) -> dict[str, Any]:
    """``test_accuracy``, ``test_loss`` (the mean negative log-likelihood) and ``test_calibration_error``."""
    logits, labels = (
        torch.cat(parts) for parts in zip(*evaluation.logits(evaluation.data.test_batches()), strict=True)
    )
    return {
        "test_loss": float(F.cross_entropy(logits.double(), labels)),
        "test_accuracy": float((logits.argmax(1) == labels).double().mean()),
        "test_calibration_error": calibration_error(logits.softmax(1), labels),
    }


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error: ``sum over bins of n_b / N * |accuracy_b - confidence_b|``.

    The confidence of a sample is its largest probability; bins of equal width divide (0, 1]. Guo, Pleiss, Sun,
    Weinberger: "On Calibration of Modern Neural Networks", ICML 2017.
    """
    confidence, found = probabilities.double().max(1)
    hit = (found == labels).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, hit - confidence)
    return float(gap.abs().sum() / len(labels))
