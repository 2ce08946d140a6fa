"""The libraries compared, one file each, used as their documentation says and in the way that is fastest for them."""

from .base import MAX_ITER, Peer, Solved, Unsuited
from .exact import EXACT
from .flash_sinkhorn import FLASH
from .geomloss import GEOMLOSS
from .ott_jax import OTT
from .ours import OURS, TO_1E_6
from .plain_torch import PLAIN_TORCH
from .pot import POT
from .regot import REGOT

# Our row of a value comes before the others' rows of it: it is what those are compared with.
PEERS = [*OURS, *PLAIN_TORCH, *POT, *GEOMLOSS, *OTT, *FLASH, *REGOT, *EXACT]

__all__ = ["MAX_ITER", "OURS", "PEERS", "TO_1E_6", "Peer", "Solved", "Unsuited"]
