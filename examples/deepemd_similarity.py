"""DeepEMD's few-shot similarity (Zhang et al., CVPR 2020): which of five classes, known from one image each?

    python examples/deepemd_similarity.py

`similarity` is the whole method. The images are made up: an object of nine local features that says the class,
somewhere on a background that says nothing. Takes a few seconds; needs SciPy, for the exact values to compare with.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads sleep, see docs/troubleshooting.md

import torch
from torch import Tensor

import sfr_ext

WAYS, QUERIES, CHANNELS, SIZE = 5, 75, 32, 6


def similarity(query: Tensor, support: Tensor, **options: object) -> Tensor:
    """[Q, C, H, W] and [ways, C, H, W] -> [Q, ways]: 1 for equal images, 0 for unrelated ones."""
    classes = support.expand(len(query), *support.shape)  # every query faces every class; nothing is copied
    a, b = sfr_ext.cross_reference_weights(query, classes)
    weights = {"student_weight": a, "teacher_weight": b}
    return 1 - sfr_ext.emd_l2(query, classes, **weights, metric="cosine", reduction="none", **options)


def images(objects: Tensor, labels: Tensor) -> Tensor:
    """An object `[C, 3, 3]` of each label at a random place on a random background."""
    maps = torch.randn(len(labels), CHANNELS, SIZE, SIZE)
    for picture, label in zip(maps, labels, strict=True):
        top, left = torch.randint(SIZE - 2, (2,)).tolist()
        picture[:, top : top + 3, left : left + 3] = objects[label] + 0.7 * torch.randn(CHANNELS, 3, 3)
    return maps


def main() -> tuple[float, float]:
    """Accuracy, and how far the exact solver is from SciPy's."""
    torch.manual_seed(0)
    objects = torch.randn(WAYS, CHANNELS, 3, 3)
    labels = torch.arange(QUERIES) % WAYS
    support, query = images(objects, torch.arange(WAYS)), images(objects, labels)

    pooled = torch.cosine_similarity(query.mean((2, 3))[:, None], support.mean((2, 3)), dim=-1)
    exact, entropic = similarity(query, support, solver="exact"), similarity(query, support)
    for name, scores in (("pooled features", pooled), ("DeepEMD", exact), ("DeepEMD, entropic", entropic)):
        print(f"{name:18} {100 * (scores.argmax(1) == labels).float().mean():5.1f} % right")

    some = query[:WAYS]  # SciPy takes its time
    classes = support.expand(WAYS, *support.shape)
    a, b = sfr_ext.cross_reference_weights(some, classes)
    truth = 1 - sfr_ext.reference.exact_emd(sfr_ext.cost_matrix(some, classes, metric="cosine"), a, b)
    off, entropic_off = ((scores[:WAYS] - truth).abs().max().item() for scores in (exact, entropic))
    print(f"off SciPy's linear program by at most {off:.1e} (exact), {entropic_off:.1e} (entropic)")
    return (exact.argmax(1) == labels).float().mean().item(), off


if __name__ == "__main__":
    main()
