"""What the functions of `sfr_ext.reference` ask of their arguments. They take any device, and integers as well."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import checks


def real(where: str, name: str, value: Any) -> None:
    checks.a_tensor(where, name, value)
    if value.is_complex():
        checks.refuse(TypeError, where, name, "to be real", value.dtype)


def features(where: str, x_name: str, x: Any, y_name: str, y: Any, metric: Any, patch_size: Any) -> int:
    """As `checks.features`."""
    for name, value in ((x_name, x), (y_name, y)):
        real(where, name, value)
    checks.choice(where, "metric", metric, checks.METRICS)
    size = checks.whole(where, "patch_size", patch_size, 1)
    checks.feature_shapes(where, x_name, x, y_name, y, size)
    return size


def problem(where: str, cost: Any, a: Any, b: Any) -> None:
    """Costs ``[..., N, M]`` and weights that can be expanded to ``[..., N]`` and ``[..., M]``."""
    real(where, "cost", cost)
    if cost.dim() < 2 or 0 in cost.shape[-2:]:
        checks.refuse(ValueError, where, "cost", "of shape [..., N, M] with N, M at least 1", checks.shape_of(cost))
    for name, value, axis in (("a", a, -2), ("b", b, -1)):
        if value is None:
            continue
        real(where, name, value)
        shape = [*cost.shape[:-2], cost.shape[axis]]
        if not _expands(value, shape):
            wanted = f"of shape {shape} (or expandable to it) for cost of shape {checks.shape_of(cost)}"
            checks.refuse(ValueError, where, name, wanted, checks.shape_of(value))
        contents(where, name, value)


def options(where: str, objective: Any, reduction: Any) -> None:
    checks.choice(where, "objective", objective, checks.OBJECTIVES)
    checks.choice(where, "reduction", reduction, checks.REDUCTIONS)


def weight(where: str, name: str, value: Any, lead: tuple[int, ...], grid: tuple[int, ...]) -> None:
    """Weights of features, of the shapes that `checks.weight` takes."""
    if value is None:
        return
    real(where, name, value)
    one_for_all, others = checks.weight_shapes(lead, grid)
    if tuple(value.shape) not in (*one_for_all, *others):
        checks.refuse_weight(where, name, value, lead, grid)
    contents(where, name, value)


def contents(where: str, name: str, weight: Tensor) -> None:
    bad = ~((weight >= 0) & weight.isfinite())
    if bad.any():
        index = bad.nonzero()[0].tolist()
        checks.refuse(ValueError, where, name, "to be finite and non-negative", f"{weight[tuple(index)]:g} at {index}")


def solver(
    where: str, eps: Any, eps_scale: Any, reach: Any, tol: Any, max_iter: Any, problems: tuple[int, ...] | None = None
) -> tuple[Any, tuple[Any, Any], float, int]:
    """eps, the reach of each side, tol and max_iter. With ``problems``, their shape, eps may be a tensor for them."""
    checks.choice(where, "eps_scale", eps_scale, checks.EPS_SCALES)
    if isinstance(eps, Tensor) and problems is not None:
        real(where, "eps", eps)
        if not _expands(eps, list(problems)):
            checks.refuse(ValueError, where, "eps", f"of shape {list(problems)}", checks.shape_of(eps))
    else:
        eps = checks.number(where, "eps", eps, positive=True)
    tol = checks.number(where, "tol", tol, positive=False)
    return eps, checks.reaches(where, reach), tol, checks.whole(where, "max_iter", max_iter, 1)


def _expands(value: Tensor, shape: list[int]) -> bool:
    own = list(value.shape)
    return len(own) <= len(shape) and all(p in (1, q) for p, q in zip(own[::-1], shape[::-1], strict=False))
