"""Fast earth mover's distance between feature maps for PyTorch, and self-feature regularisation built on it.

>>> import torch, sfr_ext
>>> loss = sfr_ext.emd_l2(torch.randn(2, 8, 7, 7), torch.randn(2, 8, 7, 7))
"""

from . import reference
from ._version import __version__
from .build import build_info
from .channels import group_channels
from .emd import (
    ConvergenceWarning,
    EMDL2Loss,
    OTResult,
    cost_matrix,
    emd_l2,
    solve,
    solve_sample,
    warn_on_nonconvergence,
)
from .regularizer import SelfFeatureRegularizer
from .smoothing import DynamicLabelSmoothing

__all__ = [
    "ConvergenceWarning",
    "DynamicLabelSmoothing",
    "EMDL2Loss",
    "OTResult",
    "SelfFeatureRegularizer",
    "__version__",
    "build_info",
    "cost_matrix",
    "emd_l2",
    "group_channels",
    "reference",
    "solve",
    "solve_sample",
    "warn_on_nonconvergence",
]
