"""``--monitor``: how one image's patches are matched between shallow and deep layers, epoch by epoch.

OUT/monitor/epoch-0003.npz holds the plans after that epoch, OUT/monitor.png is the strip of all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import plot, solve_sample
from ..layouts import Transform
from ..sfr.comparison import Comparison
from ..sfr.features import features_of
from ..sfr.options import Options
from ..sfr.pairs import Pair, shallow_to_deep
from .config import TrainConfig, near_misses
from .engine import L
from .errors import TrainError
from .files import atomic_write

FOLDER, STRIP = Path("monitor"), Path("monitor.png")  # of OUT
_MOST = 7  # moments in a strip
# Of the plans, whichever solver trains: exact ones have one entry for each patch, which does not say how sure it is.
_EPS = 0.05


class Monitor(L.Callback):
    """Looks at the network before the first and after each epoch; changes nothing of the run.

    Args:
        config: of the run.
        model: the network.
        layers: to compare, shallow to deep, with what makes maps of their outputs.
        image: ``[C, H, W]``, bytes.
        mean, std: by which the network's images are normalised.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        layers: dict[str, Transform | None],
        image: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.out, self.eps = config.out, config.eps or _EPS
        self.model, self.transforms, self.image = model, layers, image
        self.layers = tuple(layers)
        self.mean, self.std = (torch.tensor(x).view(1, -1, 1, 1) for x in (mean, std))
        known = [name for name, _ in model.named_modules()]
        for layer in layers:
            if layer not in known:
                raise TrainError(f"--layers: the network has no layer {layer!r}{near_misses(layer, known)}")
        try:
            self.pairs: tuple[Pair, ...] = shallow_to_deep("--layers", config.pairs, self.layers)
        except ValueError as error:
            raise TrainError(f"--layers: {error}") from error
        self.options = Options("SelfFeatureRegularizer", channel_mode=config.channel_mode)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and trainer.current_epoch == 0:
            self._save(0)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self._save(trainer.current_epoch + 1)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self._draw(trainer.current_epoch)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero and isinstance(exception, KeyboardInterrupt):
            self._draw(trainer.current_epoch)

    def _save(self, epoch: int) -> None:
        kept: dict[str, Any] = {}
        for pair, (plan, cost, grid) in self._look().items():
            name = _name(pair)
            kept[f"plan {name}"] = plan.half().cpu().numpy()
            kept[f"cost {name}"] = np.float32(cost)
            kept[f"grid {name}"] = np.array(grid)
        with atomic_write(self.out / FOLDER / f"epoch-{epoch:04d}.npz") as path, path.open("wb") as file:
            np.savez_compressed(file, **kept)

    @torch.no_grad()
    def _look(self) -> dict[Pair, tuple[Tensor, float, tuple[int, int]]]:
        """For each pair the plan ``[N, N]``, the mean over groups, its cost, and the grid of the patches."""
        seen = {}
        try:
            comparison = Comparison(self.options, features_of("--layers", self._outputs(), self.transforms))
            sides = [comparison.sides(*pair) for pair in self.pairs]
        except (TypeError, ValueError) as error:
            raise TrainError(f"--monitor with --layers {','.join(self.layers)}: {error}") from error
        for (shallow, deep), (student, teacher) in zip(self.pairs, sides, strict=True):
            result = solve_sample(student, teacher, eps=self.eps)
            plan = result.plan.flatten(0, -3).mean(0)
            seen[shallow, deep] = plan, float(result.transport_cost.mean()), (student.shape[2], student.shape[3])
        return seen

    def _outputs(self) -> dict[str, Any]:
        """What the layers return for the image; the network is left in the mode in which it was."""
        outputs: dict[str, Any] = {}

        def keep(name: str) -> Any:
            return lambda module, arguments, output: outputs.__setitem__(name, output)

        like = next(self.model.parameters())
        image = (self.image[None].to(like.device, like.dtype) / 255 - self.mean.to(like)) / self.std.to(like)
        modes = {module: module.training for module in self.model.modules()}
        handles = [self.model.get_submodule(name).register_forward_hook(keep(name)) for name in self.layers]
        try:
            self.model.eval().forward(image)  # not what --compile made of it, which has not these hooks
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in modes.items():
                module.training = mode
        return {name: outputs[name] for name in self.layers}

    def _draw(self, last: int) -> None:
        epochs = [epoch for epoch in range(last + 1) if self._file(epoch).is_file()]
        if not epochs:
            return
        places = np.unique(np.linspace(0, len(epochs) - 1, min(_MOST, len(epochs))).round().astype(int))
        shown = [epochs[i] for i in places]
        moments = [dict(np.load(self._file(epoch))) for epoch in shown]
        names = [name for name in map(_name, self.pairs) if all(f"plan {name}" in moment for moment in moments)]
        if not names:  # files of a run with other layers
            return
        figure = plot.strip(
            self.image,
            {name: [moment[f"plan {name}"] for moment in moments] for name in names},
            {name: tuple(moments[0][f"grid {name}"].tolist()) for name in names},
            titles=["before" if epoch == 0 else f"epoch {epoch}" for epoch in shown],
            values={name: [float(moment[f"cost {name}"]) for moment in moments] for name in names},
        )
        with atomic_write(self.out / STRIP) as temporary:
            figure.savefig(temporary, dpi=130)

    def _file(self, epoch: int) -> Path:
        return self.out / FOLDER / f"epoch-{epoch:04d}.npz"


def _name(pair: Pair) -> str:
    return " - ".join(pair)


def first_test_image(data: Any) -> Tensor:
    """``[C, H, W]``, bytes."""
    if hasattr(data, "test_images"):
        image: Tensor = data.test_images[0]
        return image
    from .folder import FileImages

    found = FileImages(data.test, data.size, 0, False, -1).__getitems__([(0, 0)])
    if isinstance(found, str):
        raise TrainError(found)
    return found[0][0]
