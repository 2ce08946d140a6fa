"""SFR in the training of any LightningModule: ``Trainer(callbacks=[SFRCallback([...])])``."""

from .callback import SFRCallback as SFRCallback

__all__ = ["SFRCallback"]
