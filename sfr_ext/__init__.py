"""Fast earth mover's distance between feature maps for PyTorch, and self-feature regularisation built on it.

>>> import torch, sfr_ext
>>> loss = sfr_ext.emd_l2(torch.randn(2, 8, 7, 7), torch.randn(2, 8, 7, 7))
"""

from . import reference
from ._version import __version__
from .build import build_info
from .channels import group_channels
from .divergence import SelfTerm, self_term
from .emd import ConvergenceWarning, EMDL2Loss, emd_l2, warn_on_nonconvergence
from .regularizer import SelfFeatureRegularizer
from .result import OTResult
from .smoothing import DynamicLabelSmoothing
from .transport import cost_matrix, solve, solve_sample
from .weights import cross_reference_weights

__all__ = [
    "ConvergenceWarning",
    "DynamicLabelSmoothing",
    "EMDL2Loss",
    "OTResult",
    "SelfFeatureRegularizer",
    "SelfTerm",
    "__version__",
    "build_info",
    "cost_matrix",
    "cross_reference_weights",
    "emd_l2",
    "group_channels",
    "reference",
    "self_term",
    "solve",
    "solve_sample",
    "warn_on_nonconvergence",
]
