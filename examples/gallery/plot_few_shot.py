"""
Few-shot recognition with DeepEMD
=================================

Five classes, known from one image each. Images are compared patch by patch, with weights that make the background
light (Zhang et al., CVPR 2020).
"""

import matplotlib.pyplot as plt
import torch

import sfr_ext

torch.manual_seed(0)
ways, channels, size = 5, 32, 6
objects = torch.randn(ways, channels, 3, 3)


def images(labels):
    """Features: the object of a class at a random place, on a random background."""
    maps = torch.randn(len(labels), channels, size, size)
    for picture, label in zip(maps, labels, strict=True):
        top, left = torch.randint(size - 2, (2,)).tolist()
        picture[:, top : top + 3, left : left + 3] = objects[label] + 0.7 * torch.randn(channels, 3, 3)
    return maps


labels = torch.arange(100) % ways
support, query = images(torch.arange(ways)), images(labels)

# %%
# Every query faces every class; ``expand`` copies nothing.

classes = support.expand(len(query), *support.shape)
a, b = sfr_ext.cross_reference_weights(query, classes)
distance = sfr_ext.emd_l2(
    query, classes, student_weight=a, teacher_weight=b, metric="cosine", solver="exact", reduction="none"
)
print(f"right: {100 * float((distance.argmin(1) == labels).float().mean()):.0f} %")

pooled = torch.cosine_similarity(query.mean((2, 3))[:, None], support.mean((2, 3)), dim=-1)
print(f"right, by the mean of all patches: {100 * float((pooled.argmax(1) == labels).float().mean()):.0f} %")

# %%
# The weights of a query against its own class: the object stands out.

figure, axes = plt.subplots(1, 5, figsize=(10, 2.3), layout="constrained")
for k, axis in enumerate(axes):
    axis.imshow(a[k, labels[k]].view(size, size), cmap="magma")
    axis.set(title=f"class {k}", xticks=[], yticks=[])
