"""``divergence_forward``: the debiased divergence, three problems of csrc/contracts/emd.h with one eps.

``S = E(x, y) - E(x, x) / 2 - E(y, y) / 2 + eps / 2 (|a| - |b|)^2`` of entropic values (Feydy et al., 2019; the last
term, for masses that differ: Sejourne et al., 2019). All three share the eps of ``E(x, y)``, which is larger than the
one asked for where the type does not hold its potentials. A problem with itself is solved by symmetric updates, and its
gradient is taken on one side, twice. ``E(x, y)`` starts from the potential that ``y`` has with itself: where ``x = y``
that is the solution, and the divergence vanishes.

The three values nearly cancel where ``x`` is near ``y``, so what is added up, in float64, is the differences of their
dual potentials; and ``eps (|P| - |a| |b|)`` of each, which makes an error of the potentials enter squared.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..implicit import marginal, total
from .contracts import OfColumns, OfRows, Solved, SolverOptions, Value
from .derivatives import differentiable, no_second_derivative
from .emd import EmdSolved, costs_room, features_backward, solve_and_keep, solve_features, solved_room
from .gradients import NeedPair, fold_groups, named, pair_gradients
from .operator import Operator
from .solved import FINEST, Saved, Upstream
from .views import Ground, Pair, problems


class Teacher(NamedTuple):
    """The teacher's problem with itself, where it was solved beforehand, by self_forward."""

    teacher_value: Tensor | None
    teacher_potential: Tensor | None


class DivergenceSaved(NamedTuple):
    """What backward reads again of all three problems."""

    f: Tensor
    g: Tensor
    eps: Tensor
    centre: Tensor
    shift: Tensor
    x_potential: Tensor
    x_centre: Tensor
    y_potential: Tensor
    y_centre: Tensor
    cost: Tensor
    x_cost: Tensor
    y_cost: Tensor


class Divergence(NamedTuple):
    """What is returned: the value, what `DivergenceSaved` names, and how the three problems ended."""

    value: Value
    f: OfRows
    g: OfColumns
    eps: Value
    centre: Value
    shift: Value
    x_potential: OfRows
    x_centre: Value
    y_potential: OfColumns
    y_centre: Value
    n_iter: Tensor  # [..., 3], of E(x, y), E(x, x), E(y, y)
    error: Tensor
    cost: Tensor
    x_cost: Tensor
    y_cost: Tensor


class SelfSolved(NamedTuple):
    """A problem with itself; the potential is in units of the cost."""

    value: Tensor  # float64
    potential: Tensor
    error: Tensor


FORWARD = Operator(
    "divergence_forward",
    Divergence,
    pair=Pair,
    teacher=Teacher,
    ground=Ground,
    options=SolverOptions,
    caller="str",
)
BACKWARD = Operator(
    "divergence_backward",
    "(Tensor, Tensor, Tensor, Tensor)",
    grad="Tensor",
    pair=Pair,
    saved=DivergenceSaved,
    ground=Ground,
    options=SolverOptions,
    teacher_given="bool",
    need=NeedPair,
)
SELF = Operator("self_forward", SelfSolved, y="Tensor", b="Tensor?", ground=Ground, options=SolverOptions, caller="str")
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def _with_itself(options: SolverOptions, reach: float, dtype: torch.dtype) -> SolverOptions:
    """Options of a problem with itself, whose eps is given; to rounding, which costs little."""
    return options._replace(
        eps=1.0,
        relative=False,
        reach_a=reach,
        reach_b=reach,
        tol=FINEST[dtype],
        symmetric=True,
    )


def _not_iterated(pair: Pair, ground: Ground, options: SolverOptions, caller: str) -> EmdSolved:
    """Of a problem its eps and its costs."""
    return EmdSolved._make(solve_and_keep(pair, ground, options._replace(tol=0.0, max_iter=0), caller))


def _solve_itself(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    eps: Tensor,
    ground: Ground,
    options: SolverOptions,
    reach: float,
    caller: str,
    **known: Tensor,
) -> tuple[Solved, Tensor]:
    """For ``y`` = ``x`` or ``x`` once for each group; with the costs. ``known``: a start, and costs."""
    options = _with_itself(options, reach, eps.dtype)
    *solved, cost = solve_and_keep(Pair(x, y, weight, weight), ground, options, caller, eps_given=eps, **known)
    return Solved(*solved), cost


def _dual(potential: Tensor, weight: Tensor | None, reach: float, most: Tensor | float) -> Tensor:
    """What a unit of mass adds to the dual value.

    With a reach, a potential says that ``exp(-potential / reach)`` of its mass is moved. A reach far below the rounding
    of potentials makes anything of that; but no more can be moved than there is, ``most``.
    """
    if not reach:
        return potential
    moved = torch.expm1(-potential / reach)
    return -reach * torch.minimum(moved, most / marginal(weight, potential, reach))


def _sum(weight: Tensor | None, dual: Tensor, reach: float) -> Tensor:
    """Over a side, whatever stands at removed patches."""
    mass = marginal(weight, dual, reach)
    return total(mass * dual if weight is None else torch.where(mass > 0, mass * dual, 0.0))


def _potential(solved: Solved, *, of_columns: bool = False) -> Tensor:
    """That of the costs themselves, in float64."""
    centre, shift = solved.centre.double() / 2, solved.shift.double()
    if of_columns:
        return solved.g.double() + (centre - shift)[..., None]
    return solved.f.double() + (centre + shift)[..., None]


def _of_itself(solved: Solved, weight: Tensor | None, reach: float) -> Tensor:
    """The entropic value of a problem with itself, in float64."""
    most = 1.0 if weight is None else total(weight)[..., None].double().clamp(min=1.0).square()
    dual = _dual(_potential(solved), weight, reach, most)
    return 2 * _sum(weight, dual, reach) - solved.eps.double() * solved.excess.double()


def _debiased(
    pair: Pair, options: SolverOptions, between: Solved, with_x: Solved, with_y: Solved, given: Tensor | None
) -> Tensor:
    """``E(x, y)`` less half of both self terms, in float64; ``given``: that of ``y``."""
    most = _most(pair, options, between.eps)
    of_rows = functools.partial(_dual, weight=pair.a, reach=options.reach_a, most=most)
    of_columns = functools.partial(_dual, weight=pair.b, reach=options.reach_b, most=most)
    rows = of_rows(_potential(between)) - of_rows(_potential(with_x))
    columns = of_columns(_potential(between, of_columns=True))
    excess = between.excess.double() - with_x.excess.double() / 2
    if given is None:
        columns = columns - of_columns(_potential(with_y))
        excess = excess - with_y.excess.double() / 2
    value = _sum(pair.a, rows, options.reach_a) + _sum(pair.b, columns, options.reach_b)
    value = value - between.eps.double() * excess
    return value if given is None else value - given / 2


def flat(y: Tensor, b: Tensor | None, lead: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Teachers and their weights with groups folded into the batch."""
    if len(lead) == 1:
        return y, b
    if b is not None:
        b = (b if b.dim() == 3 else b[:, None].expand(*lead, -1)).flatten(0, 1)
    return y.flatten(0, 1), b


def _for_each_group(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    """What ``x`` is compared with as itself: eps differs from group to group, and weights may."""
    return x[:, None].expand(*lead, *x.shape[1:]) if len(lead) == 2 else x


def _mass_of_sides(pair: Pair, options: SolverOptions, lead: tuple[int, ...]) -> list[Tensor | None]:
    """|a| and |b|; None for 1, where no weights are given or they are normalised."""
    sides = (pair.a, options.reach_a), (pair.b, options.reach_b)
    sums = [total(w) if w is not None and reach else None for w, reach in sides]
    return [s if s is None or s.dim() == len(lead) else s[:, None] for s in sums]


def _masses(pair: Pair, options: SolverOptions, lead: tuple[int, ...]) -> Tensor | None:
    """|a| - |b|, where weights are given and not normalised."""
    mass_a, mass_b = _mass_of_sides(pair, options, lead)
    if mass_a is None and mass_b is None:
        return None
    return torch.as_tensor((1 if mass_a is None else mass_a) - (1 if mass_b is None else mass_b))


def _most(pair: Pair, options: SolverOptions, like: Tensor) -> Tensor:
    """No plan has more mass than the larger side, or the product of both, ``[..., 1]`` in float64."""
    most = torch.ones_like(like, dtype=torch.float64)
    for mass in _mass_of_sides(pair, options, tuple(like.shape)):
        if mass is not None:
            most = torch.maximum(most, mass.double())
    return most.square()[..., None]


def _empty(pair: Pair, lead: tuple[int, ...]) -> Tensor | None:
    """Which problems have a side without any weight; None: no weights are given."""
    found = [(w == 0).all(-1) for w in (pair.a, pair.b) if w is not None]
    if not found:
        return None
    each = [w if w.dim() == len(lead) else w[:, None] for w in found]
    return functools.reduce(torch.logical_or, each).expand(lead)


def _emptied(pair: Pair, solved: DivergenceSaved | EmdSolved) -> Pair:
    """With no weight on either side of an empty problem, so that both sides' problems with themselves are empty, too.

    ``solved``: for the number of patches.
    """
    empty = _empty(pair, problems(pair.x, pair.y))
    if empty is None:
        return pair

    def side(weight: Tensor | None, other: Tensor | None, count: int) -> Tensor:
        if weight is None:
            assert other is not None
            weight = other.new_full((count,), 1 / count)
        elif weight.dim() == empty.dim():
            weight = weight[:, None]
        return torch.where(empty[..., None], 0.0, weight)

    n, m = solved.f.shape[-1], solved.g.shape[-1]
    return pair._replace(a=side(pair.a, pair.b, n), b=side(pair.b, pair.a, m))


class _Three(NamedTuple):
    """The problems of a divergence, with the costs of the two that are with themselves."""

    between: Solved
    with_x: Solved
    with_y: Solved
    x_cost: Tensor
    y_cost: Tensor


def _solve_three(
    pair: Pair, known: Tensor | None, first: EmdSolved, ground: Ground, options: SolverOptions, caller: str
) -> _Three:
    """``known``: the potential that the teacher has with itself. ``first``: eps and costs of ``E(x, y)``."""
    x, y, a, b = _emptied(pair, first)
    lead = problems(x, y)
    each, b_each = flat(y, b, lead)

    def with_teacher(eps: Tensor, **known: Tensor) -> tuple[Solved, Tensor]:
        return _solve_itself(each, each, b_each, eps.flatten(), ground, options, options.reach_b, caller, **known)

    if known is not None:
        start, y_cost = known, first.eps.new_empty((*lead, 0, 0))
    else:
        solved, cost = with_teacher(first.eps)
        start, y_cost = (solved.f + solved.centre[..., None] / 2).unflatten(0, lead), cost.unflatten(0, lead)
    between = solve_features(pair, ground, options, caller, init_g=start, known=first.cost)
    used = between.eps

    more = (used > first.eps).flatten()
    # A GPU would have to be waited for, and a graph that is captured cannot be.
    if known is None and (more.is_cuda or more.any()):
        again, _ = with_teacher(used, init_g=solved.f, known=cost)
        solved = _chosen(more, again, solved)
    with_x, x_cost = _solve_itself(x, _for_each_group(x, lead), a, used, ground, options, options.reach_a, caller)
    with_y = _not_solved(with_x, known, used) if known is not None else Solved(*(t.unflatten(0, lead) for t in solved))
    return _Three(between, with_x, with_y, x_cost, y_cost)


def _chosen(which: Tensor, these: Solved, others: Solved) -> Solved:
    """Of two solutions of the same problems, by problem."""
    pairs = zip(these, others, strict=True)
    return Solved(*(torch.where(which.view(-1, *[1] * (s.dim() - 1)), t, s) for t, s in pairs))


def _not_solved(like: Solved, potential: Tensor, eps: Tensor) -> Solved:
    """A problem with itself of which the potential was known."""
    return like._replace(
        f=potential.clone(),  # also an output, which may not be an input
        centre=torch.zeros_like(eps),
        n_iter=torch.zeros_like(like.n_iter),
        error=torch.zeros_like(like.error),
    )


@FORWARD.kernel
def _forward(pair: Pair, teacher: Teacher, ground: Ground, options: SolverOptions, caller: str) -> Divergence:
    lead = problems(pair.x, pair.y)
    first = _not_iterated(pair, ground, options, caller)
    known = None if teacher.teacher_value is None else teacher.teacher_potential
    between, with_x, with_y, x_cost, y_cost = _solve_three(pair, known, first, ground, options, caller)
    value = _debiased(pair, options, between, with_x, with_y, teacher.teacher_value)
    masses = _masses(pair, options, lead)
    if masses is not None:
        value = value + between.eps / 2 * masses.square()
    value = value.to(between.eps.dtype)
    parts = (between, with_x, with_y)
    n_iter, error = torch.stack([s.n_iter for s in parts], -1), torch.stack([s.error for s in parts], -1)
    empty = _empty(pair, lead)
    if empty is not None:  # whatever the teacher has with itself
        value = value.masked_fill(empty, 0)
    return Divergence(
        value=value,
        f=between.f,
        g=between.g,
        eps=between.eps,
        centre=between.centre,
        shift=between.shift,
        x_potential=with_x.f,
        x_centre=with_x.centre,
        y_potential=with_y.f,
        y_centre=with_y.centre,
        n_iter=n_iter,
        error=error,
        cost=first.cost,
        x_cost=x_cost,
        y_cost=y_cost,
    )


def _itself_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    potential: Tensor,
    eps: Tensor,
    centre: Tensor,
    cost: Tensor,
    ground: Ground,
    options: SolverOptions,
    reach: float,
    need_features: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``-E(x, x) / 2``: by symmetry that of ``-E`` on one side. With d/deps."""
    slope = torch.empty_like(eps)
    grad_x, _, grad_a, _ = features_backward(
        Upstream(None, -grad),
        Pair(x, y, weight, weight),
        Saved(potential, potential, eps, centre, torch.zeros_like(centre)),  # of a problem with itself
        cost,
        ground,
        _with_itself(options, reach, eps.dtype),
        NeedPair(need_features, False, need_weight, False),
        eps_given=eps,
        grad_eps_given=slope,
    )
    return grad_x, grad_a, slope / 2


@BACKWARD.kernel
def _backward(
    grad: Tensor,
    pair: Pair,
    saved: DivergenceSaved,
    ground: Ground,
    options: SolverOptions,
    teacher_given: bool,
    need: NeedPair,
) -> Gradients:
    x, y, a, b = pair
    eps, relative = saved.eps, options.relative
    lead = problems(x, y)
    _, _, itself_a, itself_b = _emptied(pair, saved)
    slope = torch.zeros_like(eps)
    to_x = to_y = to_a = to_b = None
    if need.need_x or need.need_a or relative:
        itself = _for_each_group(x, lead)
        student = saved.x_potential, eps, saved.x_centre, saved.x_cost
        wanted = options.reach_a, need.need_x, need.need_a
        to_x, to_a, own = _itself_backward(grad, x, itself, itself_a, *student, ground, options, *wanted)
        if relative:
            slope = slope + own
    if (need.need_y or need.need_b or relative) and not teacher_given:
        each, b_each = flat(y, itself_b, lead)
        teacher = saved.y_potential.flatten(0, -2), eps.flatten(), saved.y_centre.flatten(), saved.y_cost
        wanted = options.reach_b, need.need_y, need.need_b
        to_y, to_b, own = _itself_backward(grad.flatten(), each, each, b_each, *teacher, ground, options, *wanted)
        slope = slope + own.view(lead)
    masses = _masses(pair, options, lead)
    if masses is not None:
        slope = slope + grad * masses.square() / 2
    between = Saved(saved.f, saved.g, eps, saved.centre, saved.shift)
    grad_x, grad_y, grad_a, grad_b = features_backward(
        Upstream(None, grad), pair, between, saved.cost, ground, options, need, grad_eps=slope
    )
    if need.need_x and to_x is not None:
        grad_x += to_x
    if need.need_y and to_y is not None:
        grad_y += to_y.view_as(grad_y)
    if need.need_a and to_a is not None:
        grad_a += fold_groups(to_a, a)
    if need.need_b and to_b is not None:
        grad_b += fold_groups(to_b.view(*lead, to_b.shape[-1]), b)
    if masses is not None:  # the same for every patch, but for those that are removed
        apart = grad * eps * masses
        if need.need_a and a is not None and options.reach_a:
            grad_a += torch.where(a > 0, fold_groups(apart, a[..., 0])[..., None], 0.0)
        if need.need_b and b is not None and options.reach_b:
            grad_b -= torch.where(b > 0, fold_groups(apart, b[..., 0])[..., None], 0.0)
    return grad_x, grad_y, grad_a, grad_b


@SELF.kernel
def _self_forward(y: Tensor, b: Tensor | None, ground: Ground, options: SolverOptions, caller: str) -> SelfSolved:
    used = _not_iterated(Pair(y, y, b, b), ground, options, caller).eps
    solved, _ = _solve_itself(y, y, b, used, ground, options, options.reach_b, caller)
    return SelfSolved(_of_itself(solved, b, options.reach_b), _potential(solved).to(solved.f.dtype), solved.error)


@FORWARD.fake
def _(pair: Pair, teacher: Teacher, ground: Ground, options: SolverOptions, caller: str) -> Divergence:
    out = solved_room(pair, ground)
    values = out.transport, out.f, out.g, out.eps, out.centre, out.shift, out.f, out.centre, out.g, out.centre
    lead = problems(pair.x, pair.y)

    def kept(x: Tensor, y: Tensor) -> Tensor:
        itself = Pair(x, y, None, None)
        return costs_room(itself, solved_room(itself, ground, out.f))

    if teacher.teacher_value is None or teacher.teacher_potential is None:
        each, _ = flat(pair.y, None, lead)
        y_cost = kept(each, each).unflatten(0, lead)
    else:
        y_cost = out.eps.new_empty((*lead, 0, 0))
    costs = costs_room(pair, out), kept(pair.x, _for_each_group(pair.x, lead)), y_cost
    ends = (out.n_iter.new_empty((*lead, 3)), out.error.new_empty((*lead, 3)))
    return Divergence._make([*map(torch.empty_like, values), *ends, *costs])


@BACKWARD.fake
def _(
    grad: Tensor,
    pair: Pair,
    saved: DivergenceSaved,
    ground: Ground,
    options: SolverOptions,
    teacher_given: bool,
    need: NeedPair,
) -> Gradients:
    grad_x, grad_y, grad_a, grad_b = pair_gradients(pair, saved.f, saved.g, need)
    return grad_x, grad_y, fold_groups(grad_a, pair.a), fold_groups(grad_b, pair.b)


@SELF.fake
def _(y: Tensor, b: Tensor | None, ground: Ground, options: SolverOptions, caller: str) -> SelfSolved:
    out = solved_room(Pair(y, y, None, None), ground)
    return SelfSolved(out.transport.double(), out.g, out.error)


def _save(
    ctx: Any,
    out: Divergence,
    pair: Pair,
    teacher: Teacher,
    ground: Ground,
    options: SolverOptions,
    caller: str,
) -> None:
    ctx.ground, ctx.options = ground, options
    ctx.teacher_given = teacher.teacher_value is not None
    ctx.save_for_backward(*pair, *(getattr(out, name) for name in DivergenceSaved._fields))


def _pull(ctx: Any, grad: Tensor, *_: Any) -> list[Tensor | None]:
    wanted = ctx.needs_input_grad[:4]
    gradients = divergence_backward(
        grad.contiguous(), *ctx.saved_tensors, *ctx.ground, *ctx.options, ctx.teacher_given, *wanted
    )
    return named(gradients, wanted)


divergence_backward = no_second_derivative(BACKWARD)
divergence_forward = differentiable(FORWARD, _save, _pull, values=1)
self_forward = SELF.registered
