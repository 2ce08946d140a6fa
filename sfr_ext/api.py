"""Where the public names come from; ``sfr_ext`` shows them as its own."""

# ruff: noqa: F401

from . import layouts, plot, reference
from .assignment import linear_assignment
from .build import build_info
from .channels import group_channels
from .distiller import FeatureDistiller
from .divergence import SelfTerm, self_term
from .emd import ConvergenceWarning, EMDL2Loss, emd_l2, warn_on_nonconvergence
from .feature_loss import self_feature_loss
from .regularizer import SelfFeatureRegularizer
from .result import OTResult
from .smoothing import DynamicLabelSmoothing
from .transport import cost_matrix, solve, solve_sample
from .weights import cross_reference_weights
