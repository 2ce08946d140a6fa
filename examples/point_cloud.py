"""Registration of two point clouds: which rotation and shift take one to the other?

    python examples/point_cloud.py

Each round matches the clouds by optimal transport, sharper from round to round, and moves one by the best rigid motion
onto what its points are matched with (Kabsch). Points are tokens `[B, N, C]` with C = 3. Takes a few seconds.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads sleep, see docs/troubleshooting.md

import torch
from torch import Tensor

import sfr_ext

POINTS = 1024


def register(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation `[3, 3]` and shift `[3]` that take `source` `[N, 3]` to `target` `[M, 3]`."""
    moved = source
    for eps in (0.3, 0.1, 0.1, 0.03, 0.01):
        result = sfr_ext.solve_sample(moved[None], target[None], metric="sqeuclidean", eps=eps)
        rotation, shift = rigid_motion(source, result.barycentric(target[None])[0])
        moved = source @ rotation.T + shift
        print(f"eps {eps}: transport cost before this round's motion {result.transport_cost.item():.4f}")
    return rotation, shift


def rigid_motion(points: Tensor, matches: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation and shift with the least sum of squared distances (Kabsch 1976)."""
    middle, goal = points.mean(0), matches.mean(0)
    u, _, v = torch.linalg.svd((matches - goal).T @ (points - middle))
    u = torch.cat([u[:, :2], u[:, 2:] * torch.det(u @ v)], dim=1)  # no reflection
    rotation = u @ v
    return rotation, goal - rotation @ middle


def main() -> float:
    """The largest entry of the rotation's error."""
    torch.manual_seed(0)
    # A spiral stair that widens: no symmetry hides the rotation.
    height, across = torch.rand(POINTS), torch.rand(POINTS)
    angle, radius = 5 * height, (0.3 + 0.7 * height) * across.sqrt()
    source = torch.stack([radius * angle.cos(), radius * angle.sin(), 1.5 * height], dim=1)
    turn = torch.linalg.matrix_exp(torch.tensor([[0.0, -0.5, 0.2], [0.5, 0.0, -0.3], [-0.2, 0.3, 0.0]]))
    target = (source @ turn.T + torch.tensor([0.3, -0.2, 0.5]))[torch.randperm(POINTS)]
    target = target + 0.01 * torch.randn(POINTS, 3)

    rotation, _ = register(source, target)
    error = (rotation - turn).abs().max().item()
    print(f"largest entry of the rotation's error: {error:.4f}")
    return error


if __name__ == "__main__":
    main()
