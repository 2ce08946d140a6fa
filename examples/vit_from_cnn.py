"""A vision transformer learns from a convolutional network: their features have other shapes and other channels.

    python examples/vit_from_cnn.py

The ViT's tokens become maps by `sfr_ext.layouts.tokens`, and learned projections take their channels to the network's.
Needs scikit-learn (pip install scikit-learn); takes a few seconds.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads sleep, see docs/troubleshooting.md

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import sfr_ext
from sfr_ext import layouts
from sfr_ext.train.models import build_model

BATCH, WIDTH = 50, 48


class ViT(nn.Module):
    """Digits of 8 x 8 pixels as 4 x 4 patches and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, 2)
        self.first = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, WIDTH))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True, norm_first=True) for _ in range(4)
        )
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.first.expand(len(x), -1, -1), x), 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def main() -> tuple[float, float]:
    torch.manual_seed(0)
    data = load_digits()
    images, labels = torch.from_numpy(data.images).float().unsqueeze(1) / 16, torch.from_numpy(data.target)
    train_images, train_labels, test_images, test_labels = images[:1200], labels[:1200], images[1200:], labels[1200:]

    teacher, _ = build_model("resnet8", channels=1, num_classes=10)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for _ in range(3):
        for index in torch.randperm(len(train_images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(teacher(train_images[index]), train_labels[index]).backward()
            optimizer.step()
    teacher.eval().requires_grad_(False)

    student = ViT()
    distiller = sfr_ext.FeatureDistiller(
        student,
        teacher,
        {"blocks.1": "layer2", "blocks.3": "layer3"},
        student_transforms={"blocks.1": layouts.tokens(), "blocks.3": layouts.tokens()},
        channel_mode="project",
        weight=0.5,
    )
    with torch.no_grad():
        student(train_images[:2]), teacher(train_images[:2])  # makes the projections, before the optimiser is built
    optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], lr=2e-3)
    first = last = 0.0
    for epoch in range(8):
        student.train()
        for index in torch.randperm(len(train_images)).split(BATCH):
            with torch.no_grad():
                teacher(train_images[index])
            loss = F.cross_entropy(student(train_images[index]), train_labels[index]) + distiller.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            last = sum(value.item() for value in distiller.values().values()) / 2
            first = first or last
        student.eval()
        with torch.no_grad():
            accuracy = (student(test_images).argmax(1) == test_labels).float().mean().item()
        print(f"epoch {epoch + 1}/8  distance {last:.3f}  test accuracy {100 * accuracy:.1f} %")
    return accuracy, last / first


if __name__ == "__main__":
    main()
