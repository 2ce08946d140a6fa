"""
Assignment: tracking points from frame to frame
===============================================

``linear_assignment`` matches rows with columns, one to one, for many problems at once. A gate forbids pairs that are
too far apart, so points may appear and vanish.
"""

import matplotlib.pyplot as plt
import torch

import sfr_ext

torch.manual_seed(2)
start, velocity = torch.rand(12, 2), 0.03 * torch.randn(12, 2)
frames = [start + t * velocity + 0.004 * torch.randn(12, 2) for t in range(12)]
frames = [frame[torch.randperm(12)] for frame in frames]  # nobody says which point is which
frames[6] = frames[6][:11]  # one is not seen

# %%
# Each frame with the next one:

figure, axis = plt.subplots(figsize=(5, 4.5), layout="constrained")
lost = 0
for before, after in zip(frames[:-1], frames[1:], strict=True):
    cost = sfr_ext.cost_matrix(before[None], after[None])
    matched = sfr_ext.linear_assignment(cost, max_cost=0.15)[0]
    lost += int((matched < 0).sum())
    for i, j in enumerate(matched.tolist()):
        if j >= 0:
            axis.plot(*zip(before[i].tolist(), after[j].tolist(), strict=True), color="#30638e", linewidth=1.5)
    axis.scatter(*before.T, s=10, color="#d1495b", zorder=2)
axis.set(xticks=[], yticks=[], title="12 points, 12 frames")
axis.set_aspect("equal")
print(f"{lost} points without a successor")

# %%
# Integers are exact, and costs may be maximised:

scores = torch.randint(0, 100, (3, 5, 5))
print(sfr_ext.linear_assignment(scores, maximize=True))
