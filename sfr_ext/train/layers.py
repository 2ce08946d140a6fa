"""``sfr-ext layers``: the layers of a network that SFR could compare, and how."""

from __future__ import annotations

import importlib
import os
import sys

import torch
from torch import nn

from ..layouts import Transform, compose, item, tokens
from ..sfr.candidates import Candidate, candidates, suggestion
from .errors import TrainError
from .models import build_model

_NOTHING = "Nothing is suggested: no two of these layers follow one another as stages do."


def layers_table(model: str, size: int, channels: int, every: bool) -> str:
    """The table and the suggestion, as lines.

    Args:
        model: a name that `build_model` knows, or ``module:function`` of one's own, which returns the network.
        size: of the images.
        channels: of the images.
        every: also layers that have none in themselves (convolutions, normalisations, activations).

    Raises:
        TrainError: there is no such network, it does not take such images, or no layer returns maps.
    """
    network = _own(model) if ":" in model else build_model(model, channels, num_classes=10)[0]
    images = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    try:
        found = candidates(network, images)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise TrainError(
            f"{model} does not take images of {channels} x {size} x {size}, see --size and --channels ({reason})"
        ) from error
    shown = [layer for layer in found if every or not layer.leaf] or found
    if not shown:
        raise TrainError(f"no layer of {model} returns maps or tokens of an image")
    rows = [("layer", "returns", "features", "transform")]
    rows += [(layer.name, _returned(layer), _shape(layer), words(layer.transform)) for layer in shown]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    chosen = suggestion(found)
    lines += ["", "To begin with:", "", _call(chosen)] if len(chosen) > 1 else ["", _NOTHING]
    return "\n".join(lines)


def words(transform: Transform | None) -> str:
    """A transform as one writes it."""
    if transform is None:
        return "-"
    if isinstance(transform, compose):
        return f"layouts.compose({', '.join(map(words, transform.transforms))})"
    if isinstance(transform, tokens):
        return "layouts.tokens()" if transform.prefix == 1 else f"layouts.tokens(prefix={transform.prefix})"
    if isinstance(transform, item):
        return f"layouts.item({transform.key!r})"
    return f"layouts.{getattr(transform, '__name__', repr(transform))}"


def _own(path: str) -> nn.Module:
    """The network that a function of the user's makes."""
    module, _, function = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as for python -m
    try:
        network = getattr(importlib.import_module(module), function)()
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise TrainError(f"{path} cannot be called ({error})") from error
    if not isinstance(network, nn.Module):
        raise TrainError(f"{path}: expected it to return an nn.Module, got {type(network).__name__}")
    return network


def _returned(layer: Candidate) -> str:
    return layer.returned + (f", {layer.calls} calls: the last counts" if layer.calls > 1 else "")


def _shape(layer: Candidate) -> str:
    return " x ".join(map(str, layer.shape))


def _call(chosen: list[Candidate]) -> str:
    """The regulariser of these layers, as code."""
    if all(layer.transform is None for layer in chosen):
        named = "[" + ", ".join(f'"{layer.name}"' for layer in chosen) + "]"
    else:
        each = (f'"{layer.name}": {words(layer.transform) if layer.transform else "layouts.nchw"}' for layer in chosen)
        named = "{" + ", ".join(each) + "}"
    channels = [layer.shape[0] for layer in chosen]
    divide = all(deep % shallow == 0 for i, shallow in enumerate(channels) for deep in channels[i + 1 :])
    mode = "" if divide else ', channel_mode="project"'
    return f"sfr = sfr_ext.SelfFeatureRegularizer(model, {named}{mode})"
