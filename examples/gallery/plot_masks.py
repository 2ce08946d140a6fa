"""
Masks and sets of different sizes
=================================

A weight of 0 removes a patch. So sets of different sizes are padded to one size, and one call compares them all.
"""

import matplotlib.pyplot as plt
import torch

import sfr_ext

torch.manual_seed(0)
sizes = [5, 9, 14, 20]
sets = [torch.randn(n, 2) + torch.tensor([2.0 * k, 0.0]) for k, n in enumerate(sizes)]

padded = torch.full((4, 20, 2), float("nan"))  # even NaN does no harm where the weight is 0
mask = torch.zeros(4, 20, dtype=torch.bool)
for k, points in enumerate(sets):
    padded[k, : sizes[k]] = points
    mask[k, : sizes[k]] = True

# %%
# All pairs of sets in one call: 4 sets on one side, and for each of them 4 on the other.

others = padded.expand(4, 4, 20, 2)
distances = sfr_ext.emd_l2(
    padded, others, student_weight=mask, teacher_weight=mask.expand(4, 4, 20), solver="exact", reduction="none"
)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(1.6, 1), layout="constrained")
for k, points in enumerate(sets):
    left.scatter(*points.T, s=20, label=f"set {k}: {sizes[k]} points")
left.legend(fontsize=8)
left.set_aspect("equal")
image = right.imshow(distances, cmap="Blues")
right.set(title="distance", xticks=range(4), yticks=range(4), xlabel="set", ylabel="set")
figure.colorbar(image)

# %%
# The same as one pair alone, without padding:

alone = sfr_ext.emd_l2(sets[0][None], sets[3][None], solver="exact")
print(float(alone), float(distances[0, 3]))
