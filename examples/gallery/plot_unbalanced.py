"""
Outliers: unbalanced and partial transport
==========================================

Balanced transport must match every point, however far away. With a ``reach``, mass that is further away than this
mostly stays where it is.
"""

import matplotlib.pyplot as plt
import torch

import sfr_ext

torch.manual_seed(1)
x = torch.randn(1, 40, 2)
y = torch.randn(1, 40, 2) + torch.tensor([1.0, 0.5])
y[0, :6] += torch.tensor([6.0, -3.0])  # six points that have no counterpart


def draw(axis, plan, title):
    for i, j in (plan > 0.2 * plan.max()).nonzero().tolist():
        ends = zip(x[0, i].tolist(), y[0, j].tolist(), strict=True)
        axis.plot(*ends, color="#c9a227", linewidth=1.2, zorder=1)
    axis.scatter(*x[0].T, s=18, color="#d1495b", zorder=2)
    axis.scatter(*y[0].T, s=18, color="#30638e", marker="s", zorder=2)
    axis.set(title=title, xticks=[], yticks=[])
    axis.set_aspect("equal")


figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
for axis, reach in zip(axes, (None, 2.0, 0.5), strict=True):
    result = sfr_ext.solve_sample(x, y, eps=0.02, reach=reach)
    moved = float(result.plan.sum())
    draw(axis, result.plan[0], f"reach = {reach}: {100 * moved:.0f} % of the mass moves")

# %%
# ``solver="exact"`` with a reach is partial transport: a point is matched or left, at a fixed price. A pair that costs
# more than the reach is never matched.

figure, axis = plt.subplots(figsize=(4, 3.2), layout="constrained")
partial = sfr_ext.solve_sample(x, y, solver="exact", reach=2.0)
draw(axis, partial.plan[0], "exact, reach = 2")

# %%
# As a loss, a reach limits what an outlier can do:

for distance in (0.0, 10.0, 100.0):
    far = y.clone()
    far[0, 0] += distance
    plain, bounded = sfr_ext.emd_l2(x, far), sfr_ext.emd_l2(x, far, reach=1.0)
    print(f"outlier at {distance:3.0f}: balanced {float(plain):.2f}, with a reach {float(bounded):.2f}")
