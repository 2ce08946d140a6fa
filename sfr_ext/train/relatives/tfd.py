"""Teacher-free feature distillation: shallow maps drawn to the first channels of deep ones (Tf-FD, between layers)."""

from __future__ import annotations

from torch import Tensor

from ..stopwatch import TimedRegularizer


class SquaredError(TimedRegularizer):
    """Each value of the student against the teacher's at the same place and channel:

    .. code-block:: text

        loss = w mean over pairs (s, d), images, places and channels of ( pool(s) - stop_gradient(pool(d)[: c_s]) )^2

    Li: "Self-Regulated Feature Learning via Teacher-free Feature Distillation", ECCV 2022, of which this is the part
    between layers, "a simple l2 loss without complex transformations"; the part within a layer is left out. Channels
    are cropped, and features are as they are, not scaled to length 1. Pairs, pooling and warm-up are those of the
    other arms.
    """

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student.unsqueeze(1) - teacher).square().mean()
