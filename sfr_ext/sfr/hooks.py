"""Forward hooks that keep what named layers of a model return."""

from __future__ import annotations

import collections
import difflib
import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

# torch.jit.script asks each module for this method, and compiles what it returns instead.
_SCRIPT = "__prepare_scriptable__"

# Newer than the oldest torch that is supported.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


class Capture:
    """What the hooked layers returned in the last forward. Shared by the hooks and their owner, who alone empties it.

    Copies and pickles come out empty and inactive: features belong to a graph that cannot be copied, and a copied
    model has no one to take them.
    """

    def __init__(self, active: bool = False) -> None:
        self.active = active
        self.features: dict[str, Any] = {}  # in the order of the last calls
        # In the order of the first calls: of each hooked layer, and of the modules around all of them, by their names.
        self.training: dict[str, bool] = {}
        self.modes: dict[str, tuple[bool, bool]] = {}  # of each hooked layer: training, with gradients
        self.depth: int | None = None  # of the module around all layers whose call has begun this forward; None: none
        self.replicas = False  # whether copies of nn.DataParallel ran, which all write here
        self.recorded = False  # whether this forward is one to train by: in training mode, with gradients
        self.overtaken = False  # whether such a one has not been taken before another forward

    def enter(self, name: str, depth: int, training: bool, replica: bool) -> None:
        """A call of a module around all hooked layers: a new forward, but within one that began further out."""
        if self.depth is None or depth <= self.depth:
            self._begin()
            self.depth = depth
        self.replicas = self.replicas or replica
        self._note(name, training)

    def leave(self, name: str, training: bool, replica: bool, output: Any) -> None:
        """The end of a call of a hooked layer."""
        mode = (training, torch.is_grad_enabled())
        if self.modes.get(name, mode) != mode:
            self._begin()  # of a part whose owner was not called: one forward runs a layer in one mode
        self.modes[name] = mode
        self.replicas = self.replicas or replica
        self._note(name, training)
        self.features.pop(name, None)
        self.features[name] = output

    def disordered(self) -> tuple[str, str] | None:
        """A layer and one before it that has run again since, which may be in another forward: None where none has.

        Within a call of a module around them all that is no news.
        """
        if self.depth is not None:
            return None
        order = list(self.features)
        for i, name in enumerate(first := [name for name in self.training if name in self.features]):
            for later in first[i + 1 :]:
                if order.index(later) < order.index(name):
                    return later, name
        return None

    def _begin(self) -> None:
        overtaken = self.overtaken or self.recorded
        self.clear()
        self.overtaken = overtaken

    def _note(self, name: str, training: bool) -> None:
        self.training[name] = training
        self.recorded = self.recorded or (training and torch.is_grad_enabled())

    def clear(self) -> None:
        self.features.clear()
        self.training.clear()
        self.modes.clear()
        self.depth = None
        self.replicas = self.recorded = self.overtaken = False

    def __reduce__(self) -> tuple[type[Capture], tuple[()]]:
        return (Capture, ())


class Hook:
    """A forward hook or pre-hook that this package has put on somebody's module."""


class Hooks:
    """The hooks on one model, from construction to `remove`.

    Args:
        where: the owner, for messages.
        role: what the owner calls the model: "model", "student" or "teacher".
        argument: of the owner, in which layers are named.
        model: may be wrapped by ``torch.compile``, ``DistributedDataParallel`` or ``DataParallel``.
        layers: names of its modules, without the prefix of a wrapper.
    """

    def __init__(
        self, where: str, model: nn.Module, layers: Iterable[str], role: str = "model", argument: str = "layers"
    ) -> None:
        self.where = where
        self.role = role
        self.layers = tuple(layers)
        self.capture = Capture(active=True)
        self._handles: list[RemovableHandle | _Scriptable | _Attached] = []
        self._wrapped = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
        root, modules = _find_modules(where, model, self.layers, role, argument)
        self._root: Callable[[], nn.Module | None] = weakref.ref(root)
        self.owner: Callable[[], nn.Module | None] = _gone  # with whom they end
        around = _around(root, self.layers)
        self._around: Callable[[], list[nn.Module]] = _Weakly(around.values())
        for depth, (name, module) in enumerate(around.items()):
            self._handles.append(module.register_forward_pre_hook(_ForwardStart(self.capture, name, depth)))
        for name, module in zip(self.layers, modules, strict=True):
            self._handles.append(module.register_forward_hook(_LayerEnd(self.capture, name)))
        self._handles += [_Scriptable(module) for module in (*around.values(), *modules)]

    def at_end(self, hook: Callable[[nn.Module, Any, Any], None]) -> None:
        """One more forward hook of the model, and of each part of it that has all layers."""
        for module in self._around():
            self._handles.append(module.register_forward_hook(hook))

    @property
    def model(self) -> nn.Module | None:
        """Without its wrappers; None where it is gone, and in copies."""
        return self._root()

    def put_on(self) -> list[Callable[..., Any]]:
        """The hooks that are on the modules now."""
        handles = [handle for handle in self._handles if isinstance(handle, RemovableHandle)]
        return [hook for handle in handles if (hook := (handle.hooks_dict_ref() or {}).get(handle.id)) is not None]

    def attach(self, module: nn.Module, name: str) -> None:
        """Makes a submodule of the model, until `remove`."""
        root = self._root()
        assert root is not None
        if self._wrapped or hasattr(root, name):
            self.remove()
        if self._wrapped:
            raise ValueError(
                f"{self.where}: expected attach=True before the {self.role} is wrapped for several devices"
            )
        if hasattr(root, name):
            raise ValueError(f"{self.where}: expected a {self.role} without {name!r} for attach=True, and it has one")
        root.add_module(name, module)
        self._handles.append(_Attached(root, name))

    @property
    def complete(self) -> bool:
        """Whether the last forward has passed through all layers."""
        return all(name in self.capture.features for name in self.layers)

    @property
    def overtaken(self) -> bool:
        """Whether a forward in training mode, with gradients, was followed by another one before it was taken."""
        return self.capture.overtaken

    def look(self) -> tuple[dict[str, Any], bool]:
        """What `take` would return; it stays."""
        return dict(self.capture.features), any(self.capture.training.values())

    def take(self) -> tuple[dict[str, Any], bool]:
        """What each layer returned in the last forward, and whether that was in training mode; once.

        Training mode is that of the model or of any layer: one that is frozen does not decide for all.
        """
        if not self.capture.active:
            raise RuntimeError(f"{self.where}.loss: the hooks were removed; create a new object")
        features, training = self.look()
        replicas, disordered = self.capture.replicas, self.capture.disordered()
        self.capture.clear()
        if replicas:
            raise RuntimeError(
                f"{self.where}.loss: the layers ran in several copies at once, as nn.DataParallel makes them, and what "
                "they returned cannot be told apart; use DistributedDataParallel, or one device"
            )
        missing = [name for name in self.layers if name not in features]
        if missing:
            raise RuntimeError(_explain_missing(self.where, self.role, missing, list(features)))
        if disordered is not None:
            skipped, again = disordered
            raise RuntimeError(
                f"{self.where}.loss: expected one forward of the {self.role} since the last call, but {again!r} has "
                f"run again after {skipped!r}, whose map may be of an earlier forward; call loss() after each forward, "
                "or call a module that all layers are part of, and not the layers one by one"
            )
        return features, training

    def remove(self) -> None:
        """Takes the hooks off and drops the outputs. Calling it again does nothing."""
        # Those of torch.jit last: they stay where hooks do.
        for handle in sorted(self._handles, key=lambda handle: isinstance(handle, _Scriptable)):
            handle.remove()
        self._handles.clear()
        self.capture.active = False
        self.capture.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_root": _gone, "owner": _gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The copy of an object that owns both the model and its hooks works like the original.
        self.__dict__.update(state)
        self.capture.active = bool(self._handles)


class _ForwardStart(Hook):
    """Pre-hook of the model and of the modules within it that hold all layers, any of which may be what is called.

    A new forward drops what an earlier one left.
    """

    def __init__(self, capture: Capture, name: str, depth: int) -> None:
        self.capture = capture
        self.name = name
        self.depth = depth

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.capture.active and _is_forward():
            self.capture.enter(self.name, self.depth, module.training, _is_replica(module))


class _LayerEnd(Hook):
    """Hook of one layer: keeps its output. Of a layer that runs several times in a forward, the last one counts."""

    def __init__(self, capture: Capture, name: str) -> None:
        self.capture = capture
        self.name = name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.capture.active or not _is_forward() or isinstance(output, torch.fx.Proxy):
            return
        self.capture.leave(self.name, module.training, _is_replica(module), output)


class _Scriptable:
    """Lets ``torch.jit.script`` take a module, whose hooks it would compile: it is given a twin that lists none."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        if not hasattr(module, _SCRIPT):  # of its own: what torch.compile returns sets attributes of what it wraps
            vars(module)[_SCRIPT] = _Twin(module)

    def remove(self) -> None:
        module = self._module()
        if module is None or any(isinstance(hook, Hook) for hook in _hooks_of(module)):
            return
        if isinstance(vars(module).get(_SCRIPT), _Twin):
            del vars(module)[_SCRIPT]

    def __reduce__(self) -> tuple[type[_Nothing], tuple[()]]:
        return (_Nothing, ())


class _Attached:
    """A submodule of the model, until it is removed."""

    def __init__(self, root: nn.Module, name: str) -> None:
        self._root, self._name = weakref.ref(root), name

    def remove(self) -> None:
        root = self._root()
        if root is not None and self._name in root._modules:
            delattr(root, self._name)

    def __reduce__(self) -> tuple[type[_Nothing], tuple[()]]:
        return (_Nothing, ())


def _gone() -> None:
    """The model of a copy, which nobody asks for, and its owner."""


class _Weakly:
    """Modules, as long as they live; none of a copy."""

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._modules = [weakref.ref(module) for module in modules]

    def __call__(self) -> list[nn.Module]:
        return [module for reference in self._modules if (module := reference()) is not None]

    def __reduce__(self) -> tuple[type[_Weakly], tuple[()]]:
        return (_Weakly, ())


class _Nothing:
    """What a copy has instead of the two above."""

    def remove(self) -> None:
        pass


class _Twin:
    """The module with its own parameters, buffers and hooks, those of this file unlisted.

    They are called all the same: what scripts a module that the hooked one is part of puts the twin into its place.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> nn.Module:
        return _twin(self.module, {})


class _Unlisted(collections.OrderedDict[int, Callable[..., Any]]):
    """Hooks as a module calls them, by ``items``; in ``values``, which ``torch.jit`` compiles, without ours."""

    def values(self) -> Any:
        return [hook for hook in super().values() if not isinstance(hook, Hook)]

    def __reduce__(self) -> Any:
        return (collections.OrderedDict, (list(self.items()),))


def _hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _twin(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    if isinstance(module, torch.jit.ScriptModule):
        return module
    twin = made[id(module)] = module.__new__(type(module))
    twin.__dict__ = dict(module.__dict__)
    twin.__dict__.pop(_SCRIPT, None)
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        twin.__dict__[name] = _Unlisted(module.__dict__[name])
    children = module._modules.items()
    twin.__dict__["_modules"] = {key: child if child is None else _twin(child, made) for key, child in children}
    return twin


def _is_forward() -> bool:
    """Whether this is a forward that someone may want the outputs of."""
    if torch.compiler.is_compiling():
        # Not an export, whose outputs hold no numbers. (Outside of dynamo, only export says that it compiles.)
        return torch.compiler.is_dynamo_compiling() and not _is_exporting()
    # Not while autograd runs: a checkpoint computes its layers again in backward. Not while jit records what is called.
    return torch._C._current_graph_task_id() == -1 and not torch.jit.is_tracing()


def _is_replica(module: nn.Module) -> bool:
    return getattr(module, "_is_replica", False)


def _find_modules(
    where: str, model: nn.Module, layers: tuple[str, ...], role: str, argument: str
) -> tuple[nn.Module, list[nn.Module]]:
    """The model inside of its wrappers, and its modules of these names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: expected {role} to be an nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # what torch.compile returns
            model = model._orig_mod  # type: ignore[assignment]
        else:
            break
    modules = named_parts(model)
    modules.pop("")
    whose = "" if role == "model" else f"the {role}, "
    for name in layers:
        if name not in modules:
            raise ValueError(
                f"{where}: expected {argument} to name modules of {whose}{type(model).__name__}, got {name!r}; "
                f"{_what_there_is(name, list(modules))}"
            )
    found = [modules[name] for name in layers]
    first = {id(module): name for module, name in zip(reversed(found), reversed(layers), strict=True)}
    for name, module in zip(layers, found, strict=True):
        if (other := first[id(module)]) != name:
            raise ValueError(f"{where}: expected {argument} to name a module once, got {other!r} and {name!r} for one")
    return model, found


def named_parts(model: nn.Module) -> dict[str, nn.Module]:
    """As ``named_modules()`` has them; those of a compiled part also without the prefix of ``torch.compile``."""
    modules = dict(model.named_modules())
    return {plain_name(name): module for name, module in modules.items()} | modules


def plain_name(name: str) -> str:
    """Of a part, without what ``torch.compile`` puts between."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _what_there_is(name: str, modules: list[str]) -> str:
    """Names like this one; where there are none, some that the model has."""
    if not modules:
        return "the model has no submodules"
    if near := difflib.get_close_matches(name, modules, n=5, cutoff=0.5):
        return f"near to it: {', '.join(map(repr, near))}"
    more = ", ..." if len(modules) > 5 else ""
    return f"nothing is near to it; there are {', '.join(map(repr, modules[:5]))}{more}"


def _around(root: nn.Module, layers: tuple[str, ...]) -> dict[str, nn.Module]:
    """The modules that all layers are part of, by name, from the root inwards."""
    parts = [name.split(".")[:-1] for name in layers]
    common = list(itertools.takewhile(lambda each: len(set(each)) == 1, zip(*parts, strict=False)))
    around = {"": root}
    for depth in range(1, len(common) + 1):
        name = ".".join(part for part, *_ in common[:depth])
        around[name] = root.get_submodule(name)
    return around


def _explain_missing(where: str, role: str, missing: list[str], seen: list[str]) -> str:
    """The usual cause first; docs/troubleshooting.md has the others at length."""
    absent = ", ".join(map(repr, missing))
    if seen:
        return (
            f"{where}.loss: the last forward of the {role} has passed through {', '.join(map(repr, seen))}, but not "
            f"through {absent}: a condition skips it; its parts are called and not itself (checkpointing of its "
            "children, quantisation-aware training); or it was replaced since this object was made (adapters, "
            "quantisation)"
        )
    return (
        f"{where}.loss: call {role}(images) before each loss(): no forward has passed through {absent} since the last "
        "call. If one was made: a copy ran (weight averaging, torch.jit, torch.fx, nn.DataParallel); the forward skips "
        "these layers, calls only their parts (checkpointing), or has others in their place (quantisation); or "
        "torch.compile took a graph from before this object was made: call torch.compiler.reset() first"
    )
