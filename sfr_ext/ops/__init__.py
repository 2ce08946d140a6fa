"""The operators ``torch.ops.sfr_ext.*``: what they are called, how each device runs them, their fakes, their autograd.

Arguments have been checked by :mod:`sfr_ext.checks`; formulas and shapes are stated once, in ``csrc/contracts/*.h``. An
operator allocates its outputs with torch and hands them, with sizes and strides, to :mod:`sfr_ext._C`, which knows
nothing of torch.
"""

from .assignment import assignment_forward
from .contracts import DTYPES, METRIC_NAMES, METRICS, STRATEGIES, ExactOptions, ExactSolved, Solved, SolverOptions
from .cost import cost_forward
from .directions import directions_forward
from .directions import in_one_pass as directions_in_one_pass
from .divergence import Divergence, SelfSolved, divergence_forward, flat, self_forward
from .emd import EmdSolved, emd_forward
from .emd_value import emd_value
from .exact import exact_forward, exact_plan
from .exact_emd import exact_emd_forward
from .exact_emd import in_one_pass as exact_in_one_pass
from .launch import forced, forced_method
from .sinkhorn import sinkhorn_forward
from .snapshot import copied
from .solved import FINEST, Given, Saved, saved
from .views import Ground, Pair, compute_dtype, patch_grids, problems

__all__ = [
    "DTYPES",
    "FINEST",
    "METRICS",
    "METRIC_NAMES",
    "STRATEGIES",
    "Divergence",
    "EmdSolved",
    "ExactOptions",
    "ExactSolved",
    "Given",
    "Ground",
    "Pair",
    "Saved",
    "SelfSolved",
    "Solved",
    "SolverOptions",
    "assignment_forward",
    "compute_dtype",
    "copied",
    "cost_forward",
    "directions_forward",
    "directions_in_one_pass",
    "divergence_forward",
    "emd_forward",
    "emd_value",
    "exact_emd_forward",
    "exact_forward",
    "exact_in_one_pass",
    "exact_plan",
    "flat",
    "forced",
    "forced_method",
    "patch_grids",
    "problems",
    "saved",
    "self_forward",
    "sinkhorn_forward",
]
