"""Pictures of a matching: which patch goes where, what that costs, and how it changes while a network learns.

>>> import torch, sfr_ext
>>> image = torch.rand(3, 32, 32)
>>> features = torch.nn.functional.avg_pool2d(image[None], 4)           # [1, 3, 8, 8]
>>> result = sfr_ext.solve_sample(features, features.flip(3), solver="exact")
>>> figure = sfr_ext.plot.matches(image, image.flip(2), result)         # figure.savefig("matches.png")
>>> type(figure).__name__
'Figure'

Figures are made without pyplot: nothing has to be closed. All functions need matplotlib, an optional extra, which is
imported when the first of them is called: ``pip install matplotlib``.
"""

from .costs import cost
from .lines import matches
from .matrix import plan
from .overview import overview
from .strip import strip

__all__ = ["cost", "matches", "overview", "plan", "strip"]
