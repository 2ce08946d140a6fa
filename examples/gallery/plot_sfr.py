"""
SFR on a small network
======================

Self-feature regularisation: deep layers of a network teach its own shallow layers. Two additions to an ordinary loop.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import sfr_ext
from sfr_ext.train.models import build_model

torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.images).float()[:, None] / 16
labels = torch.from_numpy(digits.target)

model, stages = build_model("resnet8", channels=1, num_classes=10)
epochs, batch = 4, 100
steps = epochs * (1200 // batch)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)

sfr = sfr_ext.SelfFeatureRegularizer(model, stages, solver="exact")
smooth = sfr_ext.DynamicLabelSmoothing(0.1, total_steps=steps)

history = []
for _ in range(epochs):
    model.train()
    for index in torch.randperm(1200).split(batch):
        entropy = smooth(model(images[index]), labels[index])
        feature = sfr.loss()
        optimizer.zero_grad()
        (entropy + feature).backward()
        optimizer.step()
        smooth.step()
        history.append((float(entropy.detach()), float(feature.detach()), smooth.current))

model.eval()
with torch.no_grad():
    right = model(images[1200:]).argmax(1) == labels[1200:]
print(f"test accuracy {100 * float(right.float().mean()):.1f} %")

# %%
# Look at the losses apart: the smoothing rises, and with it the least value that the cross-entropy can have.

entropy, feature, smoothing = zip(*history, strict=True)
figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
curves = {"cross-entropy": entropy, "feature loss": feature, "smoothing": smoothing}
for axis, (name, values) in zip(axes, curves.items(), strict=True):
    axis.plot(values, color="#30638e")
    axis.set(xlabel="step", title=name)

# %%
# What is matched to what: the shallow map of one image with its deep map.

sfr.remove()
maps = []
for name in stages[:2]:
    layer = model.get_submodule(name)
    layer.register_forward_hook(lambda module, given, output: maps.append(output))
with torch.no_grad():
    model(images[1200:1201])
shallow, deep = (F.normalize(each, dim=1) for each in maps)
groups = sfr_ext.group_channels(deep, shallow.shape[1])  # as wide as the shallow map
result = sfr_ext.solve_sample(shallow, groups, solver="exact")
picture = sfr_ext.plot.matches(images[1200], images[1200], result)
