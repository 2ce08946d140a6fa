"""
Distillation by feature maps
============================

A small network learns from the feature maps of a larger one. Their layers have different channels: a learned projection
takes one to the other.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import sfr_ext

torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.images).float()[:, None] / 16
labels = torch.from_numpy(digits.target)
known, test = slice(0, 1000), slice(1000, None)


def network(*channels):
    blocks, before = [], 1
    for width in channels:
        blocks.append(nn.Sequential(nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()))
        before = width
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))
    return nn.Sequential(*blocks, head)


def train(model, part, epochs, extra=None, parameters=()):
    optimizer = torch.optim.AdamW([*model.parameters(), *parameters], lr=3e-3)
    curve = []
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(images[part])).split(50):
            loss = F.cross_entropy(model(images[part][index]), labels[part][index])
            if extra is not None:
                loss = loss + extra(images[part][index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            model.eval()
            curve.append(float((model(images[test]).argmax(1) == labels[test]).float().mean()))
    return curve


teacher = network(32, 48, 64)
print(f"teacher: {100 * train(teacher, known, 6)[-1]:.1f} % of the test images")
teacher.eval().requires_grad_(False)

# %%
# The student knows 200 labels. Its layer 1 is to match layer 1 of the teacher, and its layer 2 layer 2.

few = slice(0, 200)
torch.manual_seed(1)
alone = train(network(8, 12, 16), few, 25)

torch.manual_seed(1)
student = network(8, 12, 16)
distiller = sfr_ext.FeatureDistiller(student, teacher, {"1": "1", "2": "2"}, channel_mode="project")
with torch.no_grad():
    student(images[:2]), teacher(images[:2])  # makes the projections, before the optimiser is built
distances = []


def feature_loss(batch):
    with torch.no_grad():
        teacher(batch)
    loss = distiller.loss()
    distances.append(float(loss.detach()))
    return loss


taught = train(student, few, 25, feature_loss, distiller.parameters())

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.plot(distances, color="#30638e")
left.set(xlabel="step", ylabel="distance of the features")
right.plot(alone, color="#8d99ae", label="alone")
right.plot(taught, color="#d1495b", label="taught")
right.set(xlabel="epoch", ylabel="test accuracy of the student")
right.legend(frameon=False)

# %%
# One seed says nothing about which is better. ``sfr-ext study`` compares methods over many seeds.
