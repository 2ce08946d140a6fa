"""What to give instead of features or weights of a shape that is refused, where that is clear; else nothing."""

from __future__ import annotations

from torch import Tensor


def other_axes(name: str, x: Tensor, y: Tensor) -> str:
    """What to do about a student with an axis too many or too few."""
    if x.dim() == 2:
        return f"; for one set of tokens, give {name}[None]"
    if x.dim() != 5:
        return ""
    if y.dim() == 5:
        return f"; for pairs of groups, give {name}.flatten(0, 1) and the other side's, too"
    return "; groups are the other side's: swap the two"


def features(x_name: str, x: Tensor, y_name: str, y: Tensor) -> str:
    """What to do about a usual mistake: axes in another order, a map and tokens, no batch, groups of the student,
    other channels, or queries and classes of another number."""
    p, q, maps = tuple(x.shape), tuple(y.shape), x.dim() == 4
    channel = -3 if maps else -1
    if not maps and len(q) == 4 and q[:2] == (p[0], p[2]):
        return f"; to compare tokens with a map, give {y_name}.flatten(2).mT"
    if maps and len(q) == 3 and (q[0], q[2]) == p[:2]:
        return f"; to compare a map with tokens, give {x_name}.flatten(2).mT"
    same_kind = len(q) == len(p) or (len(q) == len(p) + 1 and q[0] == p[0])
    if same_kind and q[channel] != p[channel]:
        found = _in_another_order(x_name, p, y_name, q, maps)
        if found and maps:
            return found
        return found + (  # tokens do not show which axis is which
            "; features of different channels have no distance: project one side to the other's channels, as "
            'FeatureDistiller with channel_mode="project" does for layers of networks'
        )
    if len(q) == len(p) - 1:
        if q[0] == p[0] and q[-1] == p[-1]:
            if len(q) == 2:
                return f"; for one vector in place of each set, give {y_name}[:, None]"
            if q == p[1:]:
                return (
                    f"; groups are the other side's: swap the two (or, without a batch, {y_name}.expand({p[0]}, ...))"
                )
        if q[channel] == p[channel]:
            return f"; to compare each of {x_name} with {y_name}, give {y_name}.expand({p[0]}, *{y_name}.shape)"
        if q[0] == p[0] and q[-1] == p[-1]:
            return "; groups are the other side's: swap the two (or, for [B, H, W, C], flatten(1, 2))"
        return ""
    if len(q) == len(p) + 1 and q[1:] == p and maps:
        return f"; groups come second: give {y_name}.transpose(0, 1)"
    if len(q) == len(p) + 1 and p[0] == q[1]:  # a map without its batch passes for tokens
        in_front = f" (or, for groups in front, {y_name}.transpose(0, 1))" if q[1:] == p else ""
        return f"; for {x_name} without a batch, give {x_name}.expand({q[0]}, *{x_name}.shape){in_front}"
    if len(q) != len(p) or q[0] == p[0]:
        return ""
    return f"; to compare each of {x_name} with all of {y_name}, give {y_name}.expand({p[0]}, *{y_name}.shape)"


def _in_another_order(x_name: str, p: tuple[int, ...], y_name: str, q: tuple[int, ...], maps: bool) -> str:
    """Where the channels of one side of shapes ``p`` and ``q`` are as many as what another axis of the other has."""
    channel, other = (-3, -1) if maps else (-1, -2)
    sides = [(name, s) for name, s, t in ((x_name, p, q), (y_name, q, p)) if s[other] == t[channel]]
    if maps:  # a square in the last two axes is one of pixels
        sides = [(name, s) for name, s in sides if not s[-2] == s[-1] != s[-3]]
    if maps:  # of [B, p, p, q] and [B, q, p, p] it is the first
        last = [(name, s) for name, s in ((x_name, p), (y_name, q)) if s[-3] == s[-2] != s[-1]]
        sides = [side for side in sides if side in last] or ([] if last else sides)
    ways = []
    for name, s in sides:
        order = "mT" if not maps else "permute(0, 3, 1, 2)" if len(s) == 4 else "movedim(-1, -3)"
        ways.append(f"{name}.{order}")
    if not ways:
        return ""
    layout = "[B, H, W, C]" if maps else "[B, C, N]"
    which = sides[0][0] if len(sides) == 1 else "one side"
    return f"; {which} looks like {layout}: give {' or '.join(ways)}"


def squeezed(name: str, value: Tensor, taken: list[tuple[int, ...]]) -> str:
    """What to do about a single axis of size 1 too many, as masks have it."""
    shape = tuple(value.shape)
    axes = [i for i, size in enumerate(shape) if size == 1 and shape[:i] + shape[i + 1 :] in taken]
    return f"; give {name}.squeeze({axes[0]})" if axes else ""
