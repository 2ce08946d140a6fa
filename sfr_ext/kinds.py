"""The kind of an argument: a dense tensor, a number, an int. What is refused is told what to give instead."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from .errors import refuse

_UNWEIGHED = ("cost_matrix", "cross_reference_weights")
_WEIGHED = ("student_feat", "teacher_feat", "x", "y", "cost", "student", "teacher", "features")


def a_tensor(where: str, name: str, value: Any) -> None:
    """A Tensor that has one shape."""
    if not isinstance(value, Tensor):
        refuse(TypeError, where, name, "to be a Tensor", type(value).__name__ + _as_tensor(where, name, value))
    # A compiler of an old torch may know no is_nested.
    if not torch.compiler.is_compiling() and value.is_nested:
        fill = "math.inf" if where == "linear_assignment" else "0.0"
        came = f"a nested tensor; give torch.nested.to_padded_tensor({_short(name)}, {fill})"
        refuse(TypeError, where, name, "to be dense", came + _padding(where, name))
    if value.layout is not torch.strided:
        refuse(TypeError, where, name, "to be dense", f"{value.layout}; give {_short(name)}.to_dense()")


def _as_tensor(where: str, name: str, value: Any) -> str:
    """How to make a tensor of what came, where that is clear."""
    if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
        return f"; give torch.from_numpy({_short(name)})"
    if not isinstance(value, (list, tuple)) or not value:
        return ""
    if not all(isinstance(each, Tensor) for each in value):
        return f"; give torch.tensor({_short(name)})" if _numbers(value) else ""
    if any(each.is_nested for each in value):
        return ""
    shapes = [tuple(each.shape) for each in value]
    if len(set(map(len, shapes))) > 1:
        return f" of tensors; give the one that is meant, such as {_short(name)}[0]"
    if len(set(shapes)) == 1:
        return f"; give torch.stack({_short(name)})"
    rows = shapes[0] and len({shape[1:] for shape in shapes}) == 1
    pad = "torch.nn.utils.rnn.pad_sequence" if rows else "torch.nn.functional.pad"
    return f" of tensors; pad them to one size ({pad}){_padding(where, name)}"


def _padding(where: str, name: str) -> str:
    """What the padding is given, so that it does not count; nothing for what is 0 there itself, or has no weights."""
    if where == "linear_assignment":
        return ", with a cost of inf (maximize: -inf) for the padding"
    if where in _UNWEIGHED:
        return ""
    return ", with weights of 0 for the padding" if name in _WEIGHED else ""


def _short(name: str) -> str:
    return "it" if name.startswith("layer ") else name.split()[0]


def _numbers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_numbers, value))
    return isinstance(value, numbers.Real)


def a_number(where: str, name: str, value: Any) -> Any:
    """Python's number of any real one, such as NumPy's."""
    if type(value) in (int, float):  # not NumPy's float64, which is one, and which no compiler knows
        return value
    if isinstance(value, (torch.SymInt, torch.SymFloat)):  # while torch.export records
        return float(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        refuse(TypeError, where, name, "to be a number", _with_item(name, value))
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def an_int(where: str, name: str, value: Any) -> int:
    """Python's int of any integer, such as NumPy's."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, torch.SymInt):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        refuse(TypeError, where, name, "to be an int", _with_item(name, value))
    return int(value)


def a_bool(where: str, name: str, value: Any) -> bool:
    """Python's bool, of NumPy's too."""
    if isinstance(value, bool):
        return value
    if (type(value).__module__, type(value).__name__) in _BOOLS:
        return bool(value)
    refuse(TypeError, where, name, "to be a bool", type(value).__name__)


_BOOLS = ("numpy", "bool"), ("numpy", "bool_")


def _with_item(name: str, value: Any) -> str:
    one = isinstance(value, Tensor) and value.dim() == 0
    return type(value).__name__ + (f"; give {name}.item()" if one else "")
