"""The operators ``torch.ops.sfr_ext.*``: what they are called, how each device runs them, their fakes, their autograd.

Arguments have been checked by :mod:`sfr_ext.checks`; formulas and shapes are stated once, in ``csrc/contracts/*.h``. An
operator allocates its outputs with torch and hands addresses, sizes and strides to :mod:`sfr_ext._C`, which knows
nothing of torch.
"""

from .cost import cost_forward
from .divergence import divergence_forward, flat, self_forward
from .emd import emd_forward
from .exact import exact_forward, exact_plan
from .launch import STRATEGIES, forced
from .sinkhorn import sinkhorn_forward
from .views import METRICS, compute_dtype, patch_grids, problems

__all__ = [
    "METRICS",
    "STRATEGIES",
    "compute_dtype",
    "cost_forward",
    "divergence_forward",
    "emd_forward",
    "exact_forward",
    "exact_plan",
    "flat",
    "forced",
    "patch_grids",
    "problems",
    "self_forward",
    "sinkhorn_forward",
]
