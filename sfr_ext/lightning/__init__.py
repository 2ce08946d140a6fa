"""SFR in the training of any LightningModule: ``Trainer(callbacks=[SFRCallback([...])])``."""

from ..extras import how_to_install

try:
    from .callback import SFRCallback as SFRCallback
except ModuleNotFoundError as error:
    if error.name != "lightning":
        raise
    how = how_to_install("train", "lightning")
    raise ModuleNotFoundError(
        f"sfr_ext.lightning needs lightning, not installed here: {how}", name="lightning"
    ) from error

__all__ = ["SFRCallback"]
