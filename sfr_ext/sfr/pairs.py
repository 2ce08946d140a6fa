"""Which layers, and which of them teaches which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..layouts import Transform, is_transform, kind_of

Pair = tuple[str, str]
Pairs = str | Sequence[tuple[str, str]]


def named_layers(where: str, layers: Sequence[str] | Mapping[str, Transform | None]) -> dict[str, Transform | None]:
    """Names in order, each with its transform or None."""
    if isinstance(layers, str) or not isinstance(layers, (Sequence, Mapping)):
        raise TypeError(f"{where}: expected layers to be a dict or a list of names, got {type(layers).__name__}")
    for name in layers:
        if not isinstance(name, str):
            raise TypeError(f"{where}: expected layers to hold names (str), got {type(name).__name__}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"{where}: expected layers without repetition, got {list(layers)}")
    if not isinstance(layers, Mapping):
        return dict.fromkeys(layers)
    check_transforms(where, "layers", layers)
    return dict(layers)


def check_transforms(where: str, argument: str, transforms: Mapping[str, Any]) -> None:
    for name, transform in transforms.items():
        if transform is not None and not is_transform(transform):
            raise TypeError(
                f"{where}: expected {argument} to map {name!r} to a function or None, got {kind_of(transform)}"
            )


def shallow_to_deep(where: str, pairs: Pairs, layers: Sequence[str], argument: str = "layers") -> tuple[Pair, ...]:
    """(shallow, deep) names, of layers that are given from shallow to deep, in ``argument``."""
    if len(layers) < 2:
        raise ValueError(f"{where}: expected {argument} of at least 2 layers, got {list(layers)}")
    if isinstance(pairs, str):
        if pairs == "all":
            return tuple((s, d) for i, s in enumerate(layers) for d in layers[i + 1 :])
        if pairs == "last":
            return tuple((s, layers[-1]) for s in layers[:-1])
        raise ValueError(f'{where}: expected pairs "all", "last" or a list of (shallow, deep) names, got {pairs!r}')
    if not isinstance(pairs, Sequence):
        raise TypeError(
            f"{where}: expected pairs to be a str or a list of (shallow, deep) names, got {type(pairs).__name__}"
        )
    if not pairs:
        raise ValueError(f"{where}: expected pairs to hold at least one pair, got an empty list")
    named = []
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"{where}: expected pairs to hold (shallow, deep) names, got {pair!r}")
        shallow, deep = pair[0], pair[1]
        if shallow not in layers or deep not in layers:
            raise ValueError(f"{where}: expected pairs to use names from {argument} {list(layers)}, got {pair!r}")
        if layers.index(shallow) >= layers.index(deep):
            raise ValueError(f"{where}: expected pairs (shallow, deep) in the order of {argument}, got {pair!r}")
        if (shallow, deep) in named:
            raise ValueError(f"{where}: expected pairs without repetition, got {(shallow, deep)!r} twice")
        named.append((shallow, deep))
    return tuple(named)
