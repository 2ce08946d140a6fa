"""What `solve` and `solve_sample` return."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, implicit, ops
from .versions import Inputs

Grid = tuple[int, ...]


class Coupling(NamedTuple):
    """A plan, and the weights it was solved for: normalised unless their side has a reach, in float64."""

    plan: Tensor  # [..., N, M]
    a: Tensor  # [..., N]
    b: Tensor  # [..., M]
    room: Tensor | None = None  # [..., N, M], 0 where the plan may not become larger; None: nowhere


class OTResult:
    """Solved transport problems, one per entry of ``[B]`` (``[B, G]`` with groups).

    Attributes:
        transport_cost: ``<P, C>``, differentiable. Without a reach, of the plan scaled to a mass of 1, which it lacks
            where ``max_iter`` ended early.
        entropic_cost: ``<P, C> + eps KL(P | a b^T)``, differentiable. Computed as ``<a, f> + <b, g>``. With a reach
            the minimum of that problem. The same as ``transport_cost`` for ``solver="exact"``.
        f: ``[..., N]`` potential of the student's side, in units of the cost. At removed patches
            without meaning; with ``solver="exact"`` 0, or, of given costs, ``min_j cost_ij - g_j`` over the kept ones.
        g: ``[..., M]`` potential of the teacher's side. Only the sum ``f_i + g_j`` is determined, unless there is a
            reach.
        eps: regularisation used, in units of the cost; 0 for ``solver="exact"``.
        n_iter: iterations that each problem took: updates of both potentials, or steps of the conjugate gradients
            inside a Newton step, which cost as much (where its system is factorised instead, as many as have its
            multiplications); for ``solver="exact"`` augmentations.
        marginal_error: ``|P 1 - a|_1 + |P^T 1 - b|_1``, with ``a`` and ``b`` summing to 1; with a reach see `solve`.
        dual_gap: for ``solver="exact"``, a bound of what the value is above the least one, in units of the cost:
            ``sum_ij P_ij max(C_ij - f_i - g_j, 0)``, and the largest ``f_i + g_j - C_ij`` that rounding allows times
            the mass. NaN for Sinkhorn.
        converged: ``marginal_error <= tol``. That is of the problem at ``eps``, which is larger than the one asked for
            where ``max_iter`` ended the way to it, or where the type does not hold its potentials. For
            ``solver="exact"`` also ``dual_gap <= 1e-9 sum P |C|`` (1e-5 in float32), so that the plan is proved to be
            optimal.

    It can be pickled, copied and saved with ``torch.save``; copies are detached and carry the plan, which is computed
    for them.

    >>> import copy, torch
    >>> from sfr_ext import solve
    >>> result = solve(torch.rand(3, 4, requires_grad=True))
    >>> other = copy.deepcopy(result)
    >>> torch.equal(other.plan, result.plan), other.plan.requires_grad
    (True, False)
    """

    transport_cost: Tensor
    entropic_cost: Tensor
    f: Tensor
    g: Tensor
    eps: Tensor
    n_iter: Tensor
    marginal_error: Tensor
    dual_gap: Tensor
    converged: Tensor

    def __init__(
        self,
        *,
        transport_cost: Tensor,
        entropic_cost: Tensor,
        couple: Callable[..., Coupling],
        inputs: Inputs,
        balanced: bool,
        grids: tuple[Grid, Grid],
        **others: Callable[[], Tensor],
    ) -> None:
        self.transport_cost, self.entropic_cost = transport_cost, entropic_cost
        self._couple, self._inputs, self._balanced, self._grids = couple, inputs, balanced, grids
        self._coupling: tuple[Coupling, bool] | None = None  # and whether it has a graph: threads see both or neither
        # Made when they are first asked for: of a small problem they would take as long as solving it.
        self._later = others
        if torch.compiler.is_compiling():
            self._make_all()

    def __getattr__(self, name: str) -> Tensor:
        """Of what has not been made yet."""
        make = vars(self).get("_later", {}).get(name)
        if make is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        with torch.inference_mode(False), torch.no_grad():  # as if it had been made with the others
            value: Tensor = make()
        setattr(self, name, value)
        return value

    def _make_all(self) -> None:
        for name, make in self._later.items():
            if name not in vars(self):
                setattr(self, name, make())

    @property
    def plan(self) -> Tensor:
        """``P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)``, ``[..., N, M]``. Computed when first asked for.

        Differentiable in everything that the costs are, by the implicit function theorem: a dense system of the size
        of the smaller side, in float64, solved in backward. For ``solver="exact"`` it is a vertex, with at most
        ``N + M - 1`` entries, and has no gradient: with the costs it moves nowhere but jumps, and how it moves with the
        weights is not computed.

        Raises:
            RuntimeError: an input was changed in place since the problem was solved and before the plan was asked
                for, which would be made of a mixture. `rounded_plan` and `barycentric`, which need it, do likewise.
        """
        return self._coupled("plan").plan

    def _coupled(self, what: str) -> Coupling:
        graph = torch.is_grad_enabled() and self._inputs.requires_grad
        known = self._coupling
        if known is None or (graph and not known[1]):
            known = self._coupling = self._couple(*self._inputs.unchanged(f"OTResult.{what}")), graph
        return known[0]

    def __getstate__(self) -> dict[str, Any]:
        """Tensors without graphs, the plan among them, and nothing that could compute it anew."""
        coupling = self._coupled("plan")
        self._make_all()
        left_out = ("_couple", "_coupling", "_inputs", "_later")
        state = {name: _detached(value) for name, value in vars(self).items() if name not in left_out}
        return {**state, "_coupling": tuple(map(_detached, coupling))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _coupling=(Coupling(*state["_coupling"]), False), _inputs=Inputs(), _later={})

    def rounded_plan(self) -> Tensor:
        """The plan, made to satisfy both marginals to rounding: non-negative, ``P 1 = a``, ``P^T 1 = b``.

        Rows and columns that sum to too much are scaled down, and what is then missing is added as a matrix of rank 1
        (algorithm 2 of Altschuler, Weed, Rigollet 2017): no further than twice ``marginal_error`` in all entries
        together. Differentiable as `plan` is.

        Forbidden pairs, of cost +inf, stay 0. What the rank 1 matrix would add there is left out, so that sums may be
        short, by ``marginal_error`` at most in all of a side together: solve with a small ``tol``.

        Raises:
            ValueError: the problem has a reach, so that its plan need not meet its marginals.

        >>> import torch
        >>> from sfr_ext import solve
        >>> result = solve(torch.rand(5, 5), max_iter=1)
        >>> torch.allclose(result.rounded_plan().sum(0), torch.full((5,), 0.2))
        True
        """
        if not self._balanced:
            checks.refuse(ValueError, "OTResult.rounded_plan", "a balanced problem", "(reach=None)", "one with a reach")
        plan, a, b, room = self._coupled("rounded_plan")
        plan = plan.double()
        plan = plan * _at_most_one(a, plan.sum(-1))[..., :, None]
        plan = plan * _at_most_one(b, plan.sum(-2))[..., None, :]
        missing_a, missing_b = (a - plan.sum(-1)).clamp_min(0), (b - plan.sum(-2)).clamp_min(0)
        total = missing_a.sum(-1, keepdim=True)
        share = missing_a / torch.where(total > 0, total, 1.0)
        added = share[..., :, None] * missing_b[..., None, :]
        if room is not None:
            added = torch.where(room != 0, added, 0.0)
        return (plan + added).to(self.f.dtype)

    def barycentric(self, y: Tensor) -> Tensor:
        """What each student patch is matched with: the mean of ``y`` under its row of the plan, ``(P y) / (P 1)``.

        Args:
            y: one vector for each teacher patch, such as the teacher's features: tokens ``[..., M, C]``; or, after
                `solve_sample` on maps, ``[..., C, H', W']`` on the grid of the teacher's patches. ``...`` are the axes
                of the problems, ``[B]`` or ``[B, G]``.

        Returns:
            The same kind on the student's side, ``[..., N, C]`` or ``[..., C, H, W]``; at least float32. 0 at student
            patches of weight 0. Differentiable in ``y`` and through the plan.

        Raises:
            TypeError, ValueError: ``y`` is of another kind, shape or device.

        >>> import torch
        >>> from sfr_ext import solve_sample
        >>> x = torch.randn(2, 8, 4, 4)
        >>> y = x.flip(3)                                     # the same patches elsewhere
        >>> match = solve_sample(x, y, eps=0.01).barycentric(y)
        >>> match.shape, torch.allclose(match, x, atol=1e-3)
        (torch.Size([2, 8, 4, 4]), True)
        """
        where = "OTResult.barycentric"
        plan, _, b, _ = self._coupled("barycentric")
        checks.tensor(where, "y", y, plan)
        lead, m = tuple(plan.shape[:-2]), plan.shape[-1]
        student, teacher = self._grids
        maps = len(teacher) == 2 and y.dim() == len(lead) + 3 and (*y.shape[:-3], *y.shape[-2:]) == (*lead, *teacher)
        if not maps and (y.dim() != len(lead) + 2 or tuple(y.shape[:-1]) != (*lead, m)):
            shapes = [f"[{', '.join(map(str, (*lead, m, 'C')))}]"]
            if len(teacher) == 2:
                shapes.append(f"[{', '.join(map(str, (*lead, 'C', *teacher)))}]")
            checks.refuse(ValueError, where, "y", "of shape " + " or ".join(shapes), checks.shape_of(y))
        tokens = y.flatten(-2).mT if maps else y
        dtype = torch.promote_types(plan.dtype, y.dtype)
        kept = b[..., None] > 0
        mass = plan.sum(-1, keepdim=True)
        share = plan / torch.where(mass > 0, mass, 1.0)
        # Autocast leaves float64 alone, in backward too.
        matched = (share.double() @ torch.where(kept, tokens.double(), 0.0)).to(dtype)
        return matched.mT.unflatten(-1, student) if maps else matched

    def __repr__(self) -> str:
        n, m = self.f.shape[-1], self.g.shape[-1]
        lead = list(self.eps.shape)
        return f"OTResult(problems={lead}, N={n}, M={m}, converged={int(self.converged.sum())})"


def of_sinkhorn(
    solved: ops.Solved,
    options: ops.SolverOptions,
    inputs: Inputs,
    as_solved: Callable[..., ops.Given],
    grids: tuple[Grid, Grid],
    lead: tuple[int, ...],
) -> OTResult:
    """Of what a Sinkhorn operator returned, for problems of any leading axes.

    ``as_solved`` makes costs and weights, as `implicit.solution` takes them, of the inputs.
    """
    axes = solved.transport.dim()

    def shaped(tensor: Tensor) -> Tensor:
        return tensor.view((*lead, *tensor.shape[axes:]))

    def couple(*now: Tensor | None) -> Coupling:
        saved = ops.Saved(*map(shaped, ops.saved(solved)))
        rounded = solved.f.dtype != torch.float64
        converged = shaped(solved.error <= options.tol) if rounded else None
        found = implicit.solution(*as_solved(*now), saved, options, converged)
        return Coupling(found.plan.to(solved.f.dtype), found.a, found.b, found.kept)

    # The solver's potentials are those of the centred costs, without what both sides exchange. Where there is no plan,
    # the centre is inf, and they are 0.
    def half() -> Tensor:
        return solved.centre.masked_fill(solved.centre == math.inf, 0)[..., None] / 2

    return OTResult(
        transport_cost=shaped(solved.transport),
        entropic_cost=shaped(solved.entropic),
        f=lambda: shaped(solved.f + (half() + solved.shift[..., None])),
        g=lambda: shaped(solved.g + (half() - solved.shift[..., None])),
        # Copies of what is read again later: these may be changed in place.
        eps=lambda: shaped(solved.eps.clone()),
        n_iter=lambda: shaped(solved.n_iter),
        marginal_error=lambda: shaped(solved.error.clone()),
        dual_gap=lambda: torch.full_like(shaped(solved.eps), torch.nan),
        converged=lambda: shaped(solved.error <= options.tol),
        couple=couple,
        inputs=inputs,
        balanced=not (options.reach_a or options.reach_b),
        grids=grids,
    )


def certified(solved: ops.ExactSolved, tol: float) -> Tensor:
    """Whether a plan is optimal to rounding, and has its marginals to ``tol``."""
    proved = solved.gap <= (1e-9 if solved.value.dtype == torch.float64 else 1e-5) * solved.magnitude
    return proved & (solved.error <= tol)


def of_exact(
    solved: ops.ExactSolved,
    lead: tuple[int, ...],
    options: ops.SolverOptions,
    inputs: Inputs,
    weights: Callable[..., tuple[Tensor | None, Tensor | None]],
    grids: tuple[Grid, Grid],
) -> OTResult:
    """Of what `ops.exact_forward` returned, for problems of any leading axes.

    ``weights`` makes those of both sides of the inputs.
    """
    n, m = solved.f.shape[-1], solved.g.shape[-1]
    value = solved.value.view(lead)

    def f() -> Tensor:
        return solved.f.view(*lead, n)

    def g() -> Tensor:
        return solved.g.view(*lead, m)

    def converged() -> Tensor:
        return certified(solved, options.tol).view(lead)

    def couple(*now: Tensor | None) -> Coupling:
        a, b = (None if given is None else given.detach() for given in weights(*now))
        plan = ops.exact_plan(solved.rows, solved.columns, solved.mass, n, m).view(*lead, n, m)
        # What rounding left missing goes to entries that are there: none is of a forbidden pair.
        return Coupling(plan, implicit.marginal(a, f().double()), implicit.marginal(b, g().double()), room=plan)

    return OTResult(
        transport_cost=value,
        entropic_cost=value,
        f=f,
        g=g,
        eps=lambda: torch.zeros_like(solved.error).view(lead),
        n_iter=lambda: solved.n_iter.view(lead),
        marginal_error=lambda: solved.error.clone().view(lead),
        dual_gap=lambda: solved.gap.clone().view(lead),
        converged=converged,
        couple=couple,
        inputs=inputs,
        balanced=not (options.reach_a or options.reach_b),
        grids=grids,
    )


def _at_most_one(wanted: Tensor, found: Tensor) -> Tensor:
    """By how much to scale down what is found where it is more than wanted."""
    return (wanted / torch.where(found > 0, found, 1.0)).clamp_max(1)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


# So that torch.load takes what torch.save wrote: it holds tensors, and loading it runs nothing.
torch.serialization.add_safe_globals([OTResult])
