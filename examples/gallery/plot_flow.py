"""
Points that flow along the gradient
===================================

The gradient of the divergence moves points until they are distributed like others. The gradient is exact, so plain
gradient descent is enough.
"""

import matplotlib.pyplot as plt
import torch

import sfr_ext

torch.manual_seed(0)
angle = 6.28 * torch.rand(200)
radius = 1 + 0.08 * torch.randn(200)
ring = torch.stack((radius * angle.cos(), radius * angle.sin()), 1)[None]
points = (0.15 * torch.randn(1, 200, 2) + 0.6).requires_grad_()

snapshots = {0: points.detach().clone()}
for step in range(1, 61):
    loss = sfr_ext.emd_l2(points, ring, metric="sqeuclidean", objective="divergence", eps=0.05, tol=1e-3)
    (gradient,) = torch.autograd.grad(loss, points)
    with torch.no_grad():
        points -= 0.15 * points.shape[1] * gradient  # each point has a mass of 1 / 200
    if step in (5, 15, 60):
        snapshots[step] = points.detach().clone()

figure, axes = plt.subplots(1, 4, figsize=(11, 2.9), layout="constrained")
for axis, (step, at) in zip(axes, snapshots.items(), strict=True):
    axis.scatter(*ring[0].T, s=6, color="#8d99ae")
    axis.scatter(*at[0].T, s=8, color="#d1495b")
    axis.set(title=f"after {step} steps", xticks=[], yticks=[], xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
    axis.set_aspect("equal")

print(f"divergence at the end: {float(loss.detach()):.5f}")
