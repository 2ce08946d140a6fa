"""
Couplings for flow matching
===========================

Flow matching trains a vector field on pairs of noise and data. Pairs that are matched by optimal transport have
straighter paths than random pairs (Tong et al. 2023; Pooladian et al. 2023).
"""

import matplotlib.pyplot as plt
import torch

import sfr_ext

torch.manual_seed(0)


def two_moons(n):
    angle = 3.14159 * torch.rand(n)
    upper = torch.rand(n) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return 1.5 * torch.stack((x - 0.5, y - 0.25), 1) + 0.05 * torch.randn(n, 2)


noise, data = torch.randn(256, 2), two_moons(256)

# %%
# The exact matching of a batch of noise with a batch of data is an assignment:

cost = sfr_ext.cost_matrix(noise[None], data[None], metric="sqeuclidean")
partner = sfr_ext.linear_assignment(cost)[0]

figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for axis, end, title in zip(axes, (data, data[partner]), ("random pairs", "matched pairs"), strict=True):
    for p, q in zip(noise, end, strict=True):
        axis.plot(*zip(p.tolist(), q.tolist(), strict=True), color="#8d99ae", linewidth=0.4, zorder=1)
    axis.scatter(*noise.T, s=5, color="#d1495b", zorder=2)
    axis.scatter(*data.T, s=5, color="#30638e", zorder=2)
    length = float((end - noise).square().sum(1).mean())
    axis.set(title=f"{title}: mean squared length {length:.2f}", xticks=[], yticks=[])
    axis.set_aspect("equal")

# %%
# An entropic plan gives random pairs that follow the plan: each row is a distribution over the data.

plan = sfr_ext.solve(cost, eps=0.05).plan[0]
sampled = torch.multinomial(plan, 1)[:, 0]
length = float((data[sampled] - noise).square().sum(1).mean())
print(f"mean squared length of pairs sampled from an entropic plan: {length:.2f}")

# %%
# Many batches at once are one call:

batches = sfr_ext.cost_matrix(torch.randn(16, 128, 2), torch.stack([two_moons(128) for _ in range(16)]))
print(sfr_ext.linear_assignment(batches).shape)
