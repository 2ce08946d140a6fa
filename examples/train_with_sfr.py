"""SFR in an ordinary PyTorch training loop: a small ResNet learns scikit-learn's handwritten digits.

    python examples/train_with_sfr.py

Needs scikit-learn (pip install scikit-learn); takes a few seconds.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads sleep, see docs/troubleshooting.md

import torch
from sklearn.datasets import load_digits

import sfr_ext
from sfr_ext.train.models import build_model

EPOCHS, BATCH = 4, 64


def main() -> float:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target)
    train_images, train_labels, test_images, test_labels = (
        images[:1500],
        labels[:1500],
        images[1500:],
        labels[1500:],
    )

    model, stages = build_model("resnet8", channels=1, num_classes=10)
    steps_per_epoch = len(train_images) // BATCH
    steps = EPOCHS * steps_per_epoch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)

    # The two additions: deep maps teach shallow ones, and labels get softer as training goes on.
    sfr = sfr_ext.SelfFeatureRegularizer(model, stages, warmup_steps=steps_per_epoch)
    smooth = sfr_ext.DynamicLabelSmoothing(0.1, total_steps=steps)

    for epoch in range(EPOCHS):
        model.train()
        for index in torch.randperm(len(train_images)).split(BATCH)[:steps_per_epoch]:
            loss = smooth(model(train_images[index]), train_labels[index]) + sfr.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            smooth.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
        print(f"epoch {epoch + 1}/{EPOCHS}  loss {loss.item():.3f}  test accuracy {100 * accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
