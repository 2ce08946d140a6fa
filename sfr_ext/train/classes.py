"""What differs between the classes of two parts of a data set."""

from __future__ import annotations

from collections.abc import Sequence

_FEW = 3  # names that a message lists


def differing(ours: Sequence[str], theirs: Sequence[str], our_place: str, their_place: str) -> str:
    """In words, the classes that one of two parts has alone; a few of them."""
    told = []
    for place, here, there in ((our_place, ours, theirs), (their_place, theirs, ours)):
        other = set(there)
        if alone := [name for name in here if name not in other]:
            more = f" and {len(alone) - _FEW} more" if len(alone) > _FEW else ""
            told.append(f"{', '.join(map(repr, alone[:_FEW]))}{more} in {place} alone")
    return "; ".join(told) or "they are in another order"
