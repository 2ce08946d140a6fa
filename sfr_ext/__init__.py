"""Fast earth mover's distance between feature maps for PyTorch, and self-feature regularisation built on it.

>>> import torch, sfr_ext
>>> loss = sfr_ext.emd_l2(torch.randn(2, 8, 7, 7), torch.randn(2, 8, 7, 7))

Distances
    emd_l2                     the distance between two sets of features, as a loss; EMDL2Loss: as a module
    self_term, SelfTerm        a teacher's own term of the divergence, solved once
    cross_reference_weights    DeepEMD's weights
    warn_on_nonconvergence     with ConvergenceWarning: say where a problem did not converge
Transport problems
    solve_sample, solve        plan, potentials and costs, for features or for a cost matrix: an OTResult
    cost_matrix                ground costs of features
    linear_assignment          rows with columns, as many as possible
Training
    SelfFeatureRegularizer     SFR on a network: deep layers teach shallow ones; self_feature_loss: of features
    DynamicLabelSmoothing      cross-entropy whose smoothing grows
    FeatureDistiller           another network teaches
    group_channels             deep channels in groups as wide as the shallow ones
More
    layouts                    from what a layer returns to features
    plot                       pictures of a matching
    reference                  the same in plain torch and SciPy: what correctness is measured against
    build_info                 what was built, what runs, and why not more

Each has its own help, such as ``help(sfr_ext.emd_l2)``.
"""

# ruff: noqa: F403, F405

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .api import *

__all__ = [
    "ConvergenceWarning",
    "DynamicLabelSmoothing",
    "EMDL2Loss",
    "FeatureDistiller",
    "OTResult",
    "SelfFeatureRegularizer",
    "SelfTerm",
    "__version__",
    "build_info",
    "cost_matrix",
    "cross_reference_weights",
    "emd_l2",
    "group_channels",
    "layouts",
    "linear_assignment",
    "plot",
    "reference",
    "self_feature_loss",
    "self_term",
    "solve",
    "solve_sample",
    "warn_on_nonconvergence",
]


_MODULES = ("layouts", "plot", "reference")


def _require_compiled_part() -> None:
    """A source folder that lies in the way has no compiled part; say so, and what to do."""
    if importlib.util.find_spec(f"{__name__}._C") is not None:
        return
    folder = Path(__file__).parent
    if found := sorted(path.name for path in folder.glob("_C.*.so")):
        reason = f"sfr_ext: the compiled part in {folder} ({found[0]}) was built for another Python; install again"
    else:
        reason = (
            f"sfr_ext has no compiled part in {folder}. If this is a clone of the repository: leave its folder after "
            "`pip install .`, since Python finds the sources there first, or run `pip install --editable .` in it"
        )
    raise ImportError(reason, name=f"{__name__}._C", path=str(folder))


def __getattr__(name: str) -> Any:
    """Load the public names when the first is asked for: the command line answers ``--help`` without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _require_compiled_part()
    if name in _MODULES:  # which others import from, while they are loaded
        return importlib.import_module(f"{__name__}.{name}")
    api = importlib.import_module(f"{__name__}.api")
    globals().update({public: getattr(api, public) for public in __all__ if public != "__version__"})
    return globals()[name]


def __dir__() -> list[str]:
    """What a user can want; not what this file imports."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


if "torch" in sys.modules:  # nothing to wait for; and the operators under torch.ops.sfr_ext are there at once
    __getattr__(__all__[0])
