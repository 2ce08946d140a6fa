"""What `test_products.py` runs in a process whose environment says SFR_EXT_CPU_DISTANCES=products."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import sfr_ext
from sfr_ext import cost_matrix, emd_l2, solve_sample


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)


def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Tokens [B, N, C] of both sides: where products cancel, and where they do not."""
    yield "unit vectors", F.normalize(random(4, 49, 512), dim=-1), F.normalize(random(4, 49, 512), dim=-1)
    yield "one side of the origin", random(4, 49, 200).relu(), random(4, 36, 200).relu()
    yield "a common offset", random(3, 50, 96) + 1000, random(3, 17, 96) + 1000
    x = random(2, 100, 64)
    yield "close", x, x + 1e-3 * random(2, 100, 64)
    y = random(2, 70, 64)
    y[:, 3], y[:, 40], y[:, 41] = x[:, 5], x[:, 50] + 1e-4, x[:, 50] + 1e-2 * random(2, 64)
    yield "some close", x, y
    yield "a copy", x, x.clone()
    apart = 1e4 * (torch.arange(100) % 2)[:, None]
    yield "clusters", x + apart, random(2, 100, 64) + apart
    yield "the first far away", x, torch.cat([1e5 * random(2, 1, 64), y], 1)
    yield "beyond squares of float32", 1e18 * x, 1e18 * y
    yield "small", 1e-15 * x, 1e-15 * y
    yield "a single one", x[:, :1], y[:, :1]
    yield "panels of channels", random(1, 20, 1025), random(1, 33, 1025)


def double(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")


def costs_are_as_near_as_those_of_differences(most: float = 8e-7) -> None:
    for name, x, y in pairs():
        right = double(x, y)
        for layout in ("tokens", "maps"):
            given = (x, y) if layout == "tokens" else (z.mT.unsqueeze(-1).contiguous() for z in (x, y))
            found = cost_matrix(*given).double()
            # float32's differences come to 3e-7.
            assert ((found - right).abs() <= most * right).all(), (name, layout, ((found - right) / right).abs().max())
        squared = cost_matrix(x, y, metric="sqeuclidean").double()
        finite = squared.isfinite()
        assert ((squared - right.square())[finite].abs() <= 2 * most * right.square()[finite] + 1e-38).all(), name


def gradients_are_those_of_float64() -> None:
    for name, x, y in pairs():
        if name in ("beyond squares of float32", "small", "the first far away", "a copy"):
            continue  # as far off by differences: squares that float32 does not hold, gradients that are nearly 0
        for objective in ("transport", "entropic"):
            found = []
            for dtype in (torch.float32, torch.float64):
                leaves = [z.to(dtype, copy=True).requires_grad_() for z in (x, y)]
                value = emd_l2(*leaves, objective=objective, eps=0.3, tol=1e-6, reduction="sum")
                found.append((value, *torch.autograd.grad(value, leaves)))
            for ours, right in zip(*found, strict=True):
                error = (ours - right).abs().max() / right.abs().max()
                assert error < 3e-4, (name, objective, error)


def removed_patches_change_no_bit() -> None:
    x, y = random(1, 40, 64).requires_grad_(), random(1, 30, 64).requires_grad_()
    a, b = torch.rand(1, 40, generator=GENERATOR), torch.rand(1, 30, generator=GENERATOR)
    a[0, ::3] = 0
    b[0, :2] = b[0, 7:20] = 0
    kept_a, kept_b = a[0] > 0, b[0] > 0
    with torch.no_grad():  # near pairs: few among all, and not among those that are kept
        y[0, kept_b.nonzero()[:10, 0]] = x[0, kept_a.nonzero()[:10, 0]] + 1e-4 * random(10, 64)
        x[0, ~kept_a], y[0, ~kept_b] = torch.nan, torch.nan
    value = emd_l2(x, y, student_weight=a, teacher_weight=b, eps=0.1, tol=1e-6)
    padded = torch.autograd.grad(value, (x, y))
    alone = [z.detach()[:, kept].contiguous().requires_grad_() for z, kept in ((x, kept_a), (y, kept_b))]
    same = emd_l2(*alone, student_weight=a[:, kept_a], teacher_weight=b[:, kept_b], eps=0.1, tol=1e-6)
    assert torch.equal(value, same)
    for with_others, without, kept in zip(padded, torch.autograd.grad(same, alone), (kept_a, kept_b), strict=True):
        assert torch.equal(with_others[:, kept], without) and (with_others[:, ~kept] == 0).all()
    # The plan is made of costs that are computed again.
    plan = solve_sample(x, y, a, b, eps=0.1, tol=1e-6).plan
    assert (plan.sum(-1) - a / a.sum()).abs().sum() < 1e-4 and (plan.sum(-2) - b / b.sum()).abs().sum() < 1e-4


def what_removed_patches_hold_changes_no_bit() -> None:
    """The exact solver's centre is a patch that it keeps, too, however patches are removed, turned or priced."""
    for n, m, metric, reach in ((40, 30, "l2", None), (30, 40, "sqeuclidean", None), (33, 35, "l2", 8.0)):
        x, y = random(2, n, 64), random(2, 3, m, 64)
        a = torch.rand(2, 3, n, generator=GENERATOR)
        b = torch.rand(2, 3, m, generator=GENERATOR)
        a[:, :, ::3], b[:, :, ::4] = 0, 0  # the first among them
        a[:, 0, 1], b[:, 2, 1:9] = 0, 0  # not the same in all groups
        removed_x, removed_y = (a == 0).all(1), b == 0
        given = {"student_weight": a.requires_grad_(), "teacher_weight": b.requires_grad_(), "metric": metric}
        for options in ({"solver": "exact"}, {"eps": 0.1}):
            found = []
            for held in (0.0, 7.0, 1e4, 1e38, -torch.inf, torch.nan):
                leaves = [
                    z.masked_fill(removed.unsqueeze(-1), held).requires_grad_()
                    for z, removed in ((x, removed_x), (y, removed_y))
                ]
                value = emd_l2(*leaves, **given, **options, reach=reach, reduction="none")
                found.append((value, *torch.autograd.grad(value.sum(), (*leaves, a, b))))
            assert all(torch.isfinite(tensor).all() for tensor in found[0])
            for other in found[1:]:
                assert all(map(torch.equal, other, found[0])), (metric, reach, options)
            assert (found[0][1][removed_x] == 0).all() and (found[0][2][removed_y] == 0).all()


def exact_transport_is_that_of_kept_patches_alone() -> None:
    for n, m in ((40, 30), (30, 40)):
        x, y = random(1, n, 64), random(1, m, 64)
        a, b = torch.rand(1, n, generator=GENERATOR), torch.rand(1, m, generator=GENERATOR)
        a[0, ::3], b[0, ::2] = 0, 0
        kept_a, kept_b = a[0] > 0, b[0] > 0
        leaves = [z.requires_grad_() for z in (x, y, a, b)]
        value = emd_l2(x, y, student_weight=a, teacher_weight=b, solver="exact")
        gradients = torch.autograd.grad(value, leaves)
        alone = [
            z.detach()[:, kept].contiguous().requires_grad_()
            for z, kept in zip(leaves, (kept_a, kept_b) * 2, strict=True)
        ]
        same = emd_l2(*alone[:2], student_weight=alone[2], teacher_weight=alone[3], solver="exact")
        assert torch.equal(value, same)
        for padded, without, kept in zip(
            gradients, torch.autograd.grad(same, alone), (kept_a, kept_b) * 2, strict=True
        ):
            assert torch.equal(padded[:, kept], without) and (padded[:, ~kept] == 0).all()


def batch_threads_and_groups_change_no_bit() -> None:
    x, y = random(5, 64, 14, 14), random(5, 2, 64, 14, 14)
    y[1, 0] = x[1] + 1e-3
    y[2, 1, :, :3] = x[2, :, :3]

    def both(x: Tensor, y: Tensor) -> list[Tensor]:
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        values = emd_l2(x, y, reduction="none")
        return [values, *torch.autograd.grad(values.sum(), (x, y))]

    torch.set_num_threads(1)
    right = both(x, y)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, both(x, y), right))
        for b in range(len(x)):
            alone = both(x[b : b + 1], y[b : b + 1])
            assert all(torch.equal(one[0], all_of_them[b]) for one, all_of_them in zip(alone, right, strict=True))
    torch.set_num_threads(1)


def equal_features_are_0_apart() -> None:
    x = random(2, 30, 48)
    y = torch.cat([random(2, 7, 48), x], 1)
    cost = cost_matrix(x, y)
    assert (cost[:, :, 7:].diagonal(dim1=1, dim2=2) == 0).all()
    leaves = [z.requires_grad_() for z in (x, y)]
    gradients = torch.autograd.grad(emd_l2(*leaves), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)


def what_is_no_number_stays_in_its_problem() -> None:
    x, y = random(3, 20, 64), random(3, 25, 64)
    right = emd_l2(x, y, reduction="none")
    for broken in (torch.nan, torch.inf):
        for where in (0, 11):
            spoilt = y.clone()
            spoilt[1, where, 5] = broken
            spoilt.requires_grad_()
            found = emd_l2(x, spoilt, reduction="none")
            (gradient,) = torch.autograd.grad(found.sum(), spoilt)
            assert torch.equal(found[::2], right[::2]) and found[1].isnan()
            assert gradient[::2].isfinite().all() and gradient[1].isnan().all()


def empty_problems_have_no_gradient() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, y = random(2, 20, 64).to(dtype).requires_grad_(), random(2, 2, 25, 64).to(dtype)
        b = torch.ones(2, 2, 25)
        b[0], b[1, 1] = 0, 0
        y[b == 0] = torch.nan
        for objective in ("transport", "divergence"):
            value = emd_l2(x, y.requires_grad_(), teacher_weight=b, objective=objective, reduction="none")
            gradients = torch.autograd.grad(value.sum(), (x, y))
            assert (value[0] == 0).all() and value[1, 1] == 0 and value[1, 0] > 0
            assert (gradients[0][0] == 0).all() and gradients[0].isfinite().all() and gradients[0][1].any()
            assert gradients[1].isfinite().all()
            y = y.detach()


def copies_have_the_same_bits() -> None:
    x = random(3, 30, 64)
    assert torch.equal(cost_matrix(x, x), cost_matrix(x, x.clone()))
    y = x[:1].expand(3, 30, 64)
    assert torch.equal(cost_matrix(x, y), cost_matrix(x, y.contiguous()))


def half_types_are_read() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x, y = random(2, 20, 64).to(dtype), random(2, 21, 64).to(dtype)
        torch.testing.assert_close(cost_matrix(x, y).double(), double(x, y), rtol=8e-7, atol=0)


if __name__ == "__main__":
    print(sfr_ext.build_info()["cpu_isa"])
    for check in (
        costs_are_as_near_as_those_of_differences,
        gradients_are_those_of_float64,
        removed_patches_change_no_bit,
        what_removed_patches_hold_changes_no_bit,
        exact_transport_is_that_of_kept_patches_alone,
        batch_threads_and_groups_change_no_bit,
        equal_features_are_0_apart,
        what_is_no_number_stays_in_its_problem,
        empty_problems_have_no_gradient,
        copies_have_the_same_bits,
        half_types_are_read,
    ):
        check()
        print(check.__name__)
