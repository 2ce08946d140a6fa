"""Which layers of a network could be compared, and by which transform: found by one forward of random images."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from .. import layouts
from ..layouts import Transform

# More tokens than this ahead of a square number of patches are hardly class tokens and registers.
_MOST_PREFIX = 16
# Layers of one size are stages of nothing: so many of them, evenly spaced, stand for all.
_SPACED = 4
# A layer with so many resolutions in it is no block and no stage, but holds the stages.
_STAGES = 3
# Modules whose maps are [B, C, H, W] whatever their sizes.
_CHANNELS_FIRST = (nn.Conv2d, nn.BatchNorm2d)


@dataclass(frozen=True)
class Candidate:
    """A layer whose output, by its transform, is features of the image."""

    name: str
    returned: str  # in words: the shape, and what it comes in
    transform: Transform | None
    shape: tuple[int, ...]  # of the features: C, H, W
    calls: int  # in one forward; the last counts
    leaf: bool  # whether it has no layers in itself
    sources: frozenset[str] | None = None  # the layers that it is computed from; None: autograd does not say


def candidates(model: nn.Module, images: Tensor) -> list[Candidate]:
    """The layers that return maps or tokens of square ``images`` ``[B, C, S, S]``, in the order in which they end.

    The model is left in evaluation mode.
    """
    batch = images.shape[0]
    grids: set[int] = set()  # sides of the maps seen so far: among tokens they tell patches from a prefix
    found: dict[str, Candidate] = {}
    calls: dict[str, int] = {}
    steps_to: dict[str, list[Transform]] = {}  # of maps whose three sides are alike
    ends: dict[str, Node | None] = {}

    def look(name: str, module: nn.Module, output: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        found.pop(name, None)
        for steps, returned, tensor in _tensors(output):
            step = _to_map(tensor, batch, grids)
            if step is None:
                continue
            transform = _composed([*steps, *step])
            shape = tuple((tensor if not step else step[0](tensor)).shape[1:])
            leaf = not any(True for _ in module.children())
            found[name] = Candidate(name, returned, transform, shape, calls[name], leaf)
            ends[name] = tensor.grad_fn
            steps_to.pop(name, None)
            if tensor.dim() == 4 and len(set(shape)) == 1 and not isinstance(module, _CHANNELS_FIRST):
                steps_to[name] = steps
            grids.add(shape[1])
            break

    def hook(name: str) -> Any:
        return lambda module, arguments, output: look(name, module, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        # A graph, for what is computed from what; without the tensors that backward would need.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: x):
            model.eval()(images.detach().requires_grad_() * 1)
    finally:
        for handle in handles:
            handle.remove()
    for name, steps in steps_to.items():
        if name in found and _channels_last_around(name, found, steps_to):
            found[name] = replace(found[name], transform=_composed([*steps, layouts.nhwc]))
    sources = _sources({name: ends[name] for name in found})
    return [replace(layer, sources=sources[layer.name]) for layer in found.values()]


def suggestion(layers: list[Candidate]) -> list[Candidate]:
    """A choice to begin with: the last layer of each resolution, among the outermost ones or, where one of these holds
    the stages of the network, among those in it; of one size alone, a few evenly spaced.

    As far as maps do not grow again, as they do in a decoder.
    """
    layers = [layer for layer in layers if not _is_frame(layer, layers)]
    level = _one_level(layers)
    outer = _in_a_row(level) or _up_to_a_decoder(level)
    inner = [_in_a_row(_one_level([x for x in layers if _within(x.name, {each.name})])) for each in outer]
    # A block holds two resolutions, where it halves them; a stage does.
    least = _STAGES if len(_grids(outer)) > 1 else 2
    # The last such part: a stem of convolutions may come before.
    outer = next((stages for stages in reversed(inner) if len(_grids(stages)) >= least), outer)
    for last in ({layer.shape[1:]: layer for layer in outer}, {layer.shape: layer for layer in outer}):
        if len(last) > 1:
            return [layer for layer in outer if layer in last.values()]
    # One layer may hold the blocks of the network, in a row: timm's ViTs have it so.
    outermost = {layer.name for layer in outer}
    holding = [layer for layer in layers if not layer.leaf] or layers
    numbered = [layer for layer in holding if layer.name.rpartition(".")[2].isdecimal()]
    blocks = [layer for layer in numbered if layer.name.rpartition(".")[0] in outermost]
    if len(blocks) < 2:  # or a frame of its own around embeddings and blocks
        blocks = [layer for layer in numbered if layer.name in outermost]
    outer = blocks if len(blocks) > 1 else outer
    count = min(_SPACED, len(outer))
    return [outer[math.ceil((i + 1) * len(outer) / count) - 1] for i in range(count)]


def _one_level(layers: list[Candidate]) -> list[Candidate]:
    """The outermost of these; without single convolutions and the like, where the others do."""
    names = {layer.name for layer in layers}
    outer = [layer for layer in layers if not _within(layer.name, names)]
    holding = [layer for layer in outer if not layer.leaf]
    return holding if len(_grids(holding)) > 1 or (holding and len(_grids(outer)) == 1) else outer


def _in_a_row(layers: list[Candidate]) -> list[Candidate]:
    """Those that all others come before or after, and not beside as the branches of a network do; up to a decoder."""
    return _up_to_a_decoder([x for x in layers if all(_connected(x, y) for y in layers)])


def _connected(a: Candidate, b: Candidate) -> bool:
    if a is b or a.sources is None or b.sources is None:
        return True
    return a.name in b.sources or b.name in a.sources


def _up_to_a_decoder(layers: list[Candidate]) -> list[Candidate]:
    grows = (i for i in range(1, len(layers)) if layers[i].shape[1] > layers[i - 1].shape[1])
    return layers[: next(grows, None)]


def _grids(layers: list[Candidate]) -> set[tuple[int, ...]]:
    return {layer.shape[1:] for layer in layers}


def _is_frame(layer: Candidate, layers: list[Candidate]) -> bool:
    """Whether it is no stage but the network or its encoder, as those of transformers: returns named things, and
    holds layers that have layers in themselves."""
    steps = layer.transform.transforms if isinstance(layer.transform, layouts.compose) else (layer.transform,)
    named = any(isinstance(step, layouts.item) and isinstance(step.key, str) for step in steps)
    return named and sum(_within(other.name, {layer.name}) and not other.leaf for other in layers) > 1


def _sources(ends: dict[str, Node | None]) -> dict[str, frozenset[str] | None]:
    """For each layer, those whose outputs its own is computed from, or is."""
    named: dict[Node, list[str]] = {}
    for name, end in ends.items():
        if end is not None:
            named.setdefault(end, []).append(name)
    found: dict[str, frozenset[str] | None] = {}
    for name, end in ends.items():
        if end is None:
            found[name] = None
            continue
        sources: set[str] = set()
        seen, left = {end}, [end]
        while left:
            node = left.pop()
            sources.update(named.get(node, ()))
            new = {other for other, _ in node.next_functions if other is not None} - seen
            seen |= new
            left += new
        found[name] = frozenset(sources - {name})
    return found


def _channels_last_around(name: str, found: dict[str, Candidate], unclear: Container[str]) -> bool:
    """Whether the maps of the nearest layers that show where their channels are have them last, all of them."""
    parts = name.split(".")[:-1]
    for i in reversed(range(len(parts) + 1)):
        near = [
            x for x in found.values() if not x.leaf and x.name not in unclear and x.name.split(".")[:i] == parts[:i]
        ]
        last = [_last(x.transform) for x in near]
        maps = [step for step in last if not isinstance(step, layouts.tokens)]
        if maps:
            return all(step is layouts.nhwc for step in maps)
    return False


def _last(transform: Transform | None) -> Transform | None:
    return transform.transforms[-1] if isinstance(transform, layouts.compose) else transform


def _within(name: str, names: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in names for i in range(1, len(parts)))


def _tensors(output: Any) -> Iterator[tuple[list[Transform], str, Tensor]]:
    """Each tensor of an output: the way to it, words for it, itself."""
    if isinstance(output, Tensor):
        yield [], str(list(output.shape)), output
        return
    parts: list[tuple[int | str, Any]] = []
    if isinstance(output, Mapping):
        parts = [(key, value) for key, value in output.items() if isinstance(key, (int, str))]
    elif isinstance(output, (tuple, list)):
        parts = list(enumerate(output))
    elif is_dataclass(output):
        parts = [(each.name, getattr(output, each.name)) for each in fields(output)]
    for key, value in parts:
        if isinstance(value, Tensor):
            yield [layouts.item(key)], f"{type(output).__name__} with {list(value.shape)} at {key!r}", value


def _to_map(x: Tensor, batch: int, grids: set[int]) -> list[Transform] | None:
    """What makes a map of a tensor; None where nothing does."""
    if not x.is_floating_point() or x.shape[:1] != (batch,) or 0 in x.shape:
        return None
    if x.dim() == 4:
        # The images are square: so are the maps.
        if x.shape[2] == x.shape[3] > 1:
            return []
        return [layouts.nhwc] if x.shape[1] == x.shape[2] > 1 else None
    if x.dim() == 3:
        count = x.shape[1]
        known = [side for side in grids if 0 <= count - side * side <= _MOST_PREFIX]
        side = max(known, default=math.isqrt(count))
        prefix = count - side * side
        return [layouts.tokens(prefix)] if side > 1 and prefix <= _MOST_PREFIX else None
    return None


def _composed(steps: list[Transform]) -> Transform | None:
    if len(steps) > 1:
        return layouts.compose(*steps)
    return steps[0] if steps else None
