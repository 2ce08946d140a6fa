"""sfr_ext.lightning.SFRCallback: what it adds, when it steps, what it logs and saves."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfr_ext import DynamicLabelSmoothing, SelfFeatureRegularizer

pytest.importorskip("lightning")

import lightning as L
from lightning.pytorch.strategies import SingleDeviceStrategy

from sfr_ext.lightning import SFRCallback

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|logging interval|predict_step|litlogger|tensorboard).*"),
]
LAYERS = ["net.0", "net.1"]
IMAGES = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, torch.arange(16) % 3), batch_size=4)


class Module(L.LightningModule):
    def __init__(self, output: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        )
        self.smooth = DynamicLabelSmoothing(0.1, total_steps=100)
        self.output = output
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.smooth(self.net(batch[0]), batch[1])
        if self.output == "none" and batch_idx == 1:
            return None
        return {"loss": loss, "more": 1} if self.output == "dict" else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False}
    settings |= {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(callbacks=list(callbacks), **(settings | options))


def plain(accumulate: int = 1, skip: int | None = None) -> Module:
    """The same training, written out."""
    module = Module()
    optimizer = module.configure_optimizers()
    sfr = SelfFeatureRegularizer(module, LAYERS, warmup_steps=8)
    for i, (images, labels) in enumerate(DATA):
        loss = module.smooth(module.net(images), labels)
        if i != skip:
            ((loss + sfr.loss()) / accumulate).backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            module.smooth.step()
    sfr.remove()
    return module


@pytest.mark.parametrize("output", ["tensor", "dict"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_losses_are_those_of_a_plain_loop(output: str, accumulate: int) -> None:
    module = Module(output)
    trainer(SFRCallback(LAYERS, warmup_steps=8), accumulate_grad_batches=accumulate).fit(module, DATA)
    torch.testing.assert_close(module.state_dict(), plain(accumulate).state_dict())
    without = Module()
    trainer(accumulate_grad_batches=accumulate).fit(without, DATA)
    assert not torch.equal(without.net[0].weight, module.net[0].weight)


def test_a_batch_that_is_left_out() -> None:
    """Lightning steps the optimiser all the same, with nothing to do."""
    module = Module("none")
    trainer(SFRCallback(LAYERS, warmup_steps=8)).fit(module, DATA)
    torch.testing.assert_close(dict(module.net.state_dict()), dict(plain(skip=1).net.state_dict()))


def test_the_module_is_as_before_afterwards() -> None:
    module = Module()
    keys = list(module.state_dict())
    callback = SFRCallback(LAYERS)
    trainer(callback).fit(module, DATA)
    assert "training_step" not in vars(module) and callback.regularizer is None
    assert list(module.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    trainer(callback).fit(module, DATA)  # and again
    assert int(callback.state_dict()["steps"]) == 8


class Failing(Module):
    error: BaseException | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.error is not None and batch_idx == 2:
            raise self.error
        return super().training_step(batch, batch_idx)


def is_clean(module: L.LightningModule) -> bool:
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    return not hooked and "training_step" not in vars(module) and not hasattr(module, "self_feature_regularizer")


def losses(module: L.LightningModule, *callbacks: SFRCallback) -> list[float]:
    """Of a fit that begins where `Module` does."""
    seen: list[float] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            seen.append(float(outputs["loss"]))

    module.net.load_state_dict(Module().net.state_dict())
    module.smooth.steps.zero_()
    torch.manual_seed(0)
    trainer(*callbacks, Look()).fit(module, DATA)
    return seen


@pytest.mark.parametrize("error", [ValueError("bad batch"), KeyboardInterrupt()])
@pytest.mark.parametrize("mode", ["match", "project"])
def test_a_fit_that_fails_leaves_nothing_on_the_module(mode: str, error: BaseException) -> None:
    module, callback = Failing(), SFRCallback(LAYERS, channel_mode=mode)
    module.error = error
    with pytest.raises((type(error), SystemExit)):
        trainer(callback).fit(module, DATA)
        raise error  # older releases of Lightning return after an interrupt
    assert is_clean(module) and callback.regularizer is None
    module.error = None
    wanted = losses(Failing(), SFRCallback(LAYERS, channel_mode=mode))
    assert losses(module, SFRCallback(LAYERS, channel_mode=mode)) == wanted
    assert (losses(module, callback) == wanted) is (mode == "match")  # which goes on with its projections
    assert losses(module) == losses(Failing())


@pytest.mark.parametrize("same", [False, True])
def test_what_a_killed_fit_left_is_undone(same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, callback = Failing(), SFRCallback(LAYERS)
    module.error = ValueError("bad batch")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="bad batch"):
        patch.setattr(SFRCallback, "on_exception", lambda *args: None)
        trainer(callback).fit(module, DATA)
    assert not is_clean(module)
    module.error = None
    assert losses(module, callback if same else SFRCallback(LAYERS)) == losses(Failing(), SFRCallback(LAYERS))
    assert is_clean(module) and callback.regularizer is None


def test_a_step_of_the_modules_own_comes_back() -> None:
    module = Module()
    own = module.training_step
    module.training_step = before = lambda batch, batch_idx: own(batch, batch_idx)  # type: ignore[method-assign]
    assert losses(module, SFRCallback(LAYERS)) == losses(Module(), SFRCallback(LAYERS))
    assert vars(module)["training_step"] is before


@pytest.mark.parametrize("accumulate, steps", [(1, 4), (2, 2), (3, 2)])
def test_smoothing_steps_with_the_optimiser(accumulate: int, steps: int) -> None:
    """Of 4 batches; the last ones of an epoch make a step also where they are fewer."""
    module = Module()
    trainer(SFRCallback(LAYERS), accumulate_grad_batches=accumulate).fit(module, DATA)
    assert int(module.smooth.steps) == steps
    module = Module()
    trainer(SFRCallback(LAYERS, step_smoothing=False), accumulate_grad_batches=accumulate).fit(module, DATA)
    assert int(module.smooth.steps) == 0


def test_what_is_logged() -> None:
    class Look(L.Callback):
        seen: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer, *args):
            self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    trainer(SFRCallback(LAYERS, weight=2.0), Look()).fit(Module(), DATA)
    assert len(Look.seen) == 4
    for row in Look.seen:
        assert row["sfr/loss"] == pytest.approx(2 * row["sfr/net.0-net.1"]) and row["sfr/loss"] > 0
    assert len({row["sfr/loss"] for row in Look.seen}) == 4


@pytest.mark.parametrize("mode", ["match", "project"])
def test_a_resumed_run_goes_on(mode: str, tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / f"epoch{trainer.current_epoch}.ckpt")

    module = Module()
    torch.manual_seed(1)
    options = {"warmup_steps": 12, "channel_mode": mode}
    trainer(SFRCallback(LAYERS, **options), Save(), max_epochs=2).fit(module, DATA)
    resumed = Module()
    trainer(SFRCallback(LAYERS, **options), max_epochs=2).fit(resumed, DATA, ckpt_path=tmp_path / "epoch0.ckpt")
    torch.testing.assert_close(resumed.state_dict(), module.state_dict())
    (state,) = states(tmp_path / "epoch0.ckpt")
    assert int(state["steps"]) == 4


def states(checkpoint: Path) -> list[dict[str, Any]]:
    """Of the callbacks."""
    saved = torch.load(checkpoint, weights_only=False)["callbacks"]
    return [state for key, state in saved.items() if "'layers'" in key]


class Judged(Module):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    validation_step = test_step


@pytest.mark.parametrize("options", [{"channel_mode": "project"}, {"attach": True}])
def test_a_checkpoint_is_loaded_without_the_regulariser(options: dict[str, Any], tmp_path: Path) -> None:
    module = Judged()
    keys = set(module.state_dict())
    save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="last", monitor="test")
    fitting = trainer(SFRCallback(LAYERS, **options), save, enable_checkpointing=True)
    fitting.fit(module, DATA, DATA)
    wanted = fitting.callback_metrics["test"]
    assert set(torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]) == keys
    assert fitting.test(module, DATA, ckpt_path="best", verbose=False) == [{"test": wanted}]
    assert fitting.validate(module, DATA, ckpt_path="best", verbose=False) == [{"test": wanted}]
    other = Judged()
    assert trainer().test(other, DATA, ckpt_path=tmp_path / "last.ckpt", verbose=False) == [{"test": wanted}]
    assert is_clean(module) and is_clean(other)
    Judged.load_from_checkpoint(tmp_path / "last.ckpt")
    fitting.save_checkpoint(tmp_path / "after.ckpt")
    torch.testing.assert_close(states(tmp_path / "after.ckpt"), states(tmp_path / "last.ckpt"))


def as_version_0_2(checkpoint: Path, to: Path) -> None:
    """Its key was the class's name; what was a submodule was in the module's state."""
    saved = torch.load(checkpoint, weights_only=False)
    (key,) = [key for key in saved["callbacks"] if key.startswith("SFRCallback")]
    state = saved["callbacks"].pop(key)
    if "projections.pair0" in state:
        saved["state_dict"].update({f"self_feature_regularizer.{name}": x for name, x in state.items()})
    else:
        saved["callbacks"]["SFRCallback"] = state
    torch.save(saved, to)


@pytest.mark.parametrize("mode", ["match", "project"])
def test_older_checkpoints(mode: str, tmp_path: Path) -> None:
    options = {"warmup_steps": 12, "channel_mode": mode}
    module = Judged()
    fitting = trainer(SFRCallback(LAYERS, **options))
    fitting.fit(module, DATA)
    fitting.save_checkpoint(tmp_path / "new.ckpt")
    as_version_0_2(tmp_path / "new.ckpt", tmp_path / "old.ckpt")
    resumed = []
    for name in ("new", "old"):
        resumed.append(Judged())
        trainer(SFRCallback(LAYERS, **options), max_epochs=2).fit(
            resumed[-1], DATA, ckpt_path=tmp_path / f"{name}.ckpt"
        )
    torch.testing.assert_close(resumed[0].state_dict(), resumed[1].state_dict(), rtol=0, atol=0)
    anew = Judged()  # with a ramp that begins again
    anew.load_state_dict(module.state_dict())
    trainer(SFRCallback(LAYERS, **options)).fit(anew, DATA)
    assert not torch.equal(anew.net[0].weight, resumed[1].net[0].weight)
    judged = Judged()
    trainer(SFRCallback(LAYERS, **options)).test(judged, DATA, ckpt_path=tmp_path / "old.ckpt", verbose=False)
    assert is_clean(judged)


def test_a_checkpoint_without_projections_is_refused(tmp_path: Path) -> None:
    fitting = trainer()
    fitting.fit(Module(), DATA)
    fitting.save_checkpoint(tmp_path / "plain.ckpt")
    module = Module()
    with pytest.raises(ValueError, match="got one without projections"):
        trainer(SFRCallback(LAYERS, channel_mode="project"), max_epochs=2).fit(
            module, DATA, ckpt_path=tmp_path / "plain.ckpt"
        )
    assert is_clean(module)


class Sharding(SingleDeviceStrategy):
    """Takes the weights out of what it has loaded, as those do that save a file for each process."""

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(*args, **kwargs)
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint.pop("state_dict"))
        return checkpoint

    def load_model_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("mode", ["match", "project"])
def test_a_sharded_checkpoint(mode: str, tmp_path: Path) -> None:
    options = {"warmup_steps": 12, "channel_mode": mode}
    fitting = trainer(SFRCallback(LAYERS, **options))
    fitting.fit(Module(), DATA)
    fitting.save_checkpoint(tmp_path / "last.ckpt")
    whole, sharded = Module(), Module()
    for module, strategy in ((whole, "auto"), (sharded, Sharding("cpu"))):
        trainer(SFRCallback(LAYERS, **options), max_epochs=2, strategy=strategy).fit(
            module, DATA, ckpt_path=tmp_path / "last.ckpt"
        )
    torch.testing.assert_close(sharded.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["WeightAveraging", "EMAWeightAveraging"])
def test_weight_averaging(name: str, tmp_path: Path) -> None:
    """Its copy of the module must have the projections."""
    kind = getattr(L.pytorch.callbacks, name, None)
    if kind is None:
        pytest.skip(f"this release of Lightning has no {name}")
    module = Module()
    with pytest.raises(ValueError, match=f"to come before {name} in callbacks"):
        trainer(kind(), SFRCallback(LAYERS, channel_mode="project")).fit(module, DATA)
    assert is_clean(module)
    trainer(kind(), SFRCallback(LAYERS)).fit(Module(), DATA)

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / f"epoch{trainer.current_epoch}.ckpt")

    torch.manual_seed(1)
    trainer(SFRCallback(LAYERS, channel_mode="project"), kind(), Save(), max_epochs=2).fit(module, DATA)
    resumed = Module()
    trainer(SFRCallback(LAYERS, channel_mode="project"), kind(), max_epochs=2).fit(
        resumed, DATA, ckpt_path=tmp_path / "epoch0.ckpt"
    )
    torch.testing.assert_close(resumed.state_dict(), module.state_dict())
    assert set(torch.load(tmp_path / "epoch0.ckpt", weights_only=False)["state_dict"]) == set(Module().state_dict())


@pytest.mark.parametrize("name", ["WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"])
def test_after_a_fit_with_an_average_of_weights(name: str, tmp_path: Path) -> None:
    """Its copy of the module has no projections then either."""
    kind = getattr(L.pytorch.callbacks, name, None)
    if kind is None:
        pytest.skip(f"this release of Lightning has no {name}")

    def average() -> L.Callback:
        return kind(swa_lrs=0.01, swa_epoch_start=1) if name == "StochasticWeightAveraging" else kind()

    module = Judged()
    save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="last", monitor="test")
    callbacks = [SFRCallback(LAYERS, channel_mode="project"), average(), save]
    fitting = trainer(*callbacks, max_epochs=3, enable_checkpointing=True)
    fitting.fit(module, DATA, DATA)
    assert is_clean(module)
    trained = copy.deepcopy(module.state_dict())
    fitting.validate(module, DATA, verbose=False)
    torch.testing.assert_close(module.state_dict(), trained, rtol=0, atol=0)
    for path in ("best", tmp_path / "last.ckpt"):
        result = fitting.test(module, DATA, ckpt_path=path, verbose=False)
        saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
        other = Judged()
        other.load_state_dict(saved.get("current_model_state", saved["state_dict"]))  # which Lightning tests after fit
        assert result == trainer().test(other, DATA, verbose=False)
        trainer().test(other, DATA, ckpt_path=tmp_path / "last.ckpt", verbose=False)
        fitting.validate(module, DATA, ckpt_path=path, verbose=False)
    fitting.fit_loop.max_epochs = 4
    fitting.fit(module, DATA, DATA)
    fitting.save_checkpoint(tmp_path / "after.ckpt")
    Judged.load_from_checkpoint(tmp_path / "after.ckpt")
    assert is_clean(module)


class Normalised(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net[0] = nn.Sequential(self.net[0], nn.BatchNorm2d(4))


def test_an_epoch_for_the_statistics_of_batch_norm_does_not_count() -> None:
    module, callback = Normalised(), SFRCallback(LAYERS)
    average = L.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(trainer.current_epoch)

    trainer(callback, average, Look(), max_epochs=3).fit(module, DATA)
    assert seen.count(3) == 4  # one epoch more
    assert int(callback.state_dict()["steps"]) == int(module.smooth.steps) == 12


def copies(module: L.LightningModule) -> dict[str, L.LightningModule]:
    return {"deepcopy": copy.deepcopy(module), "pickle": pickle.loads(pickle.dumps(module))}


@pytest.mark.parametrize("mode", ["match", "project"])
def test_copies_that_are_made_in_a_fit(mode: str) -> None:
    """They train like any module, without the callback and with one of their own, and the fit is none the wiser."""

    class Copy(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                self.made = copies(pl_module)
                self.callback = copy.deepcopy(trainer.callbacks[0])

    wanted = losses(Module(), SFRCallback(LAYERS, channel_mode=mode))
    without = losses(Module())
    for again in (False, True):
        module, callback, look = Module(), SFRCallback(LAYERS, channel_mode=mode, warmup_steps=4), Copy()
        trainer(callback, look).fit(module, DATA)
        assert is_clean(module)
        assert int(look.callback.state_dict()["steps"]) == 2 and look.callback.regularizer is None
        for how, copied in look.made.items():
            assert list(copied.parameters())[-1].shape != (8, 4, 1, 1), how
            before = copy.deepcopy(module.state_dict())
            if again:
                assert losses(copied, SFRCallback(LAYERS, channel_mode=mode)) == wanted, how
                assert not hasattr(copied, "self_feature_regularizer")
            else:
                assert losses(copied) == without, how
            torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["match", "project"])
@pytest.mark.parametrize("what", ["copy", "module", "callback"])
def test_a_trainer_within_a_fit(what: str, mode: str) -> None:
    class Look(L.Callback):
        def on_train_batch_end(self, trainer_, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                module = pl_module if what == "module" else copy.deepcopy(pl_module)
                inner = trainer_.callbacks[0] if what == "callback" else SFRCallback(LAYERS, channel_mode=mode)
                trainer(inner).test(module, DATA, verbose=False)
                pl_module.trainer = trainer_

    def fit(*looks: L.Callback) -> Judged:
        module = Judged()
        torch.manual_seed(0)
        trainer(SFRCallback(LAYERS, channel_mode=mode), *looks).fit(module, DATA)
        return module

    judged = fit(Look())
    assert is_clean(judged)
    torch.testing.assert_close(judged.state_dict(), fit().state_dict(), rtol=0, atol=0)


def test_a_trainer_within_a_fit_that_leaves_itself_on_the_module() -> None:
    class Inner(L.Callback):
        def on_train_epoch_end(self, trainer_, pl_module):
            trainer().test(pl_module, DATA, verbose=False)

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    seen = []
    for inner in ([], [Inner()]):
        module, rows = Judged(), []
        trainer(SFRCallback(LAYERS), *inner, Look(), max_epochs=2).fit(module, DATA)
        assert len(rows) == 8 and all(row["sfr/loss"] > 0 for row in rows)
        seen.append((module.state_dict(), rows))
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)


def test_a_callback_within_a_callback() -> None:
    class Outer(L.Callback):
        inner = SFRCallback(LAYERS)

        def setup(self, *args, **kwargs):
            self.inner.setup(*args, **kwargs)

        def on_fit_start(self, *args):
            self.inner.on_fit_start(*args)

        def on_train_start(self, *args):
            self.inner.on_train_start(*args)

        def on_train_batch_end(self, *args):
            self.inner.on_train_batch_end(*args)

        def teardown(self, *args, **kwargs):
            self.inner.teardown(*args, **kwargs)

    module = Module()
    assert losses(module, Outer()) == losses(Module(), SFRCallback(LAYERS))  # type: ignore[arg-type]
    assert is_clean(module)


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_layers_that_are_made_when_fit_begins(hook: str) -> None:
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        if not hasattr(self, "net"):
            self.net = self.late

    late = type("Late", (Module,), {hook: make})

    def module() -> Any:
        made = late()
        made.__dict__["late"] = made.net
        del made.net
        return made

    fitted = module()
    trainer(SFRCallback(LAYERS, warmup_steps=8)).fit(fitted, DATA)
    torch.testing.assert_close(dict(fitted.net.state_dict()), dict(plain().net.state_dict()))
    with pytest.raises(ValueError, match=f"to be there before {hook}, since"):
        trainer(SFRCallback(LAYERS, channel_mode="project")).fit(module(), DATA)


@pytest.mark.parametrize("mode", ["match", "project"])
def test_a_further_fit(mode: str) -> None:
    callback, module = SFRCallback(LAYERS, channel_mode=mode), Module()
    trainer(callback).fit(module, DATA)
    first = copy.deepcopy(callback.state_dict())
    seen: dict[str, Tensor] = {}

    class Look(L.Callback):
        def on_train_start(self, *args):
            seen.update(copy.deepcopy(dict(callback.state_dict())))

    trainer(callback, Look()).fit(module, DATA)
    torch.testing.assert_close(seen, dict(first), rtol=0, atol=0)
    assert int(callback.state_dict()["steps"]) == 8
    trainer(callback, Look()).fit(Module(), DATA)  # of another module
    assert int(seen["steps"]) == 0
    if mode == "project":
        assert not torch.equal(seen["projections.pair0"], first["projections.pair0"])
    again = pickle.loads(pickle.dumps(callback))  # as processes are given it
    trainer(again).fit(Module(), DATA)
    assert int(again.state_dict()["steps"]) == 8


@pytest.mark.parametrize("example", [None, torch.zeros(1, 3, 8, 8)])
def test_a_fit_that_does_not_begin_leaves_the_callback_as_it_was(example: Tensor | None) -> None:
    """Before the first one, and after it."""
    module, callback = Module(), SFRCallback(LAYERS, channel_mode="project")
    right = module.example_input_array
    before: dict[str, Any] = {}
    for fits in range(2):
        module.example_input_array = example
        with pytest.raises((ValueError, RuntimeError)):
            trainer(callback).fit(module, DATA)
        assert is_clean(module)
        torch.testing.assert_close(dict(callback.state_dict()), before, rtol=0, atol=0)
        module.example_input_array = right
        trainer(callback).fit(module, DATA)
        assert int(callback.state_dict()["steps"]) == 4 * (fits + 1)
        before = copy.deepcopy(dict(callback.state_dict()))


@pytest.mark.parametrize("mode", ["match", "project"])
def test_what_other_modules_do_changes_nothing_for_a_module(mode: str, tmp_path: Path) -> None:
    """Neither a fit of one that does not begin, nor a test of one with a checkpoint, nor a fit."""
    module, callback = Module(), SFRCallback(LAYERS, channel_mode=mode)
    fitting = trainer(callback)
    fitting.fit(module, DATA)
    fitting.save_checkpoint(tmp_path / "its.ckpt")
    other = Judged()
    other.net = other.net[:1]
    with pytest.raises(ValueError, match="layers"):
        trainer(callback).fit(other, DATA)
    assert int(callback.state_dict()["steps"]) == 4
    trainer(callback).test(Judged(), DATA, ckpt_path=tmp_path / "its.ckpt")
    trainer(callback).fit(module, DATA)
    assert int(callback.state_dict()["steps"]) == 8
    trainer(callback).fit(Module(), DATA)
    assert int(callback.state_dict()["steps"]) == 4
    trainer(callback).fit(module, DATA)
    assert int(callback.state_dict()["steps"]) == 12


def test_layers_of_other_channels_in_a_further_fit() -> None:
    module, callback = Module(), SFRCallback(LAYERS, channel_mode="project")
    trainer(callback).fit(module, DATA)
    module.net[1], module.net[4] = nn.Conv2d(4, 16, 3, 2, 1), nn.Linear(16, 3)
    with pytest.raises(ValueError, match="a new callback begins anew"):
        trainer(callback).fit(module, DATA)
    assert is_clean(module)
    trainer(SFRCallback(LAYERS, channel_mode="project")).fit(module, DATA)


def test_a_callback_that_a_trainer_within_a_fit_has_before_there_are_layers() -> None:
    class Late(Module):
        def setup(self, stage: str) -> None:
            self.net = Module().net

        def configure_optimizers(self) -> torch.optim.Optimizer:
            trainer(callback).test(Judged(), DATA)
            return super().configure_optimizers()

    module, callback = Late(), SFRCallback(LAYERS)
    del module.net
    trainer(callback).fit(module, DATA)
    assert int(callback.state_dict()["steps"]) == 4 and is_clean(module)


def test_names_through_a_compiled_part_are_the_same_callback() -> None:
    keys = {SFRCallback(layers).state_key for layers in (LAYERS, ["net._orig_mod.0", "net._orig_mod.1"])}
    assert len(keys) == 1


def test_without_lightning() -> None:
    code = (
        "import sys; sys.modules['lightning'] = None\n"
        "try: from sfr_ext.lightning import SFRCallback\n"
        "except ImportError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.startswith("sfr_ext.lightning needs lightning, not installed here: pip install lightning")


@pytest.mark.parametrize("when", ["after", "in"])
def test_a_copy_of_the_callback_has_nothing_of_the_module(when: str) -> None:
    class Copy(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            made.append(pickle.dumps(callback))

    made: list[bytes] = []
    module, callback = Module(), SFRCallback(LAYERS)
    module.unpicklable = lambda: None  # type: ignore[assignment]
    trainer(callback, *([Copy()] if when == "in" else [])).fit(module, DATA)
    made.append(pickle.dumps(callback))
    assert all(b"Module" not in each for each in made)
    trainer(pickle.loads(made[-1])).fit(Module(), DATA)
    assert not any(isinstance(getattr(x, "__self__", x), nn.Module) for x in vars(copy.deepcopy(callback)).values())


@pytest.mark.parametrize("mode", ["match", "project"])
def test_a_further_fit_of_a_network_that_configure_model_has_compiled(mode: str) -> None:
    class Compiled(Module):
        def configure_model(self) -> None:
            if not isinstance(self.net, torch._dynamo.OptimizedModule):
                self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]

    fitted = []
    for module in (Compiled(), Module()):
        torch.manual_seed(0)
        callback = SFRCallback(LAYERS, warmup_steps=12, channel_mode=mode)
        for _ in range(2):
            trainer(callback).fit(module, DATA)
            assert is_clean(module)
        assert int(callback.state_dict()["steps"]) == 8
        fitted.append({name.replace("._orig_mod", ""): x for name, x in module.state_dict().items()})
    torch.testing.assert_close(fitted[0], fitted[1])


class Remade(Module):
    """``setup`` makes its layers each time."""

    def setup(self, stage: str) -> None:
        self.net = Module().net


def test_projections_are_of_as_many_channels_as_they_were_made_for() -> None:
    class Wider(Module):
        def setup(self, stage: str) -> None:
            self.net[0], self.net[1] = nn.Conv2d(1, 6, 3, 1, 1), nn.Conv2d(6, 8, 3, 2, 1)

    module = Wider()
    with pytest.raises(
        ValueError, match=r"'net.0' with the 4 channels and 'net.1' with the 8 .* made for, got 6 and 8"
    ):
        trainer(SFRCallback(LAYERS, channel_mode="project")).fit(module, DATA)
    assert is_clean(module)


@pytest.mark.parametrize("mode", ["match", "project"])
def test_layers_that_are_made_anew_when_fit_begins(mode: str) -> None:
    module, plain_module = Remade(), Module()
    for each in (module, plain_module):
        torch.manual_seed(0)
        trainer(SFRCallback(LAYERS, warmup_steps=8, channel_mode=mode, max_grid=2)).fit(each, DATA)
    for again in range(2):
        assert is_clean(module)
        if mode == "match":
            torch.testing.assert_close(dict(module.net.state_dict()), dict(plain_module.net.state_dict()))
        module.smooth.steps.zero_()
        if not again:
            trainer(SFRCallback(LAYERS, warmup_steps=8, channel_mode=mode, max_grid=2)).fit(module, DATA)


class Wrapping(L.Callback):
    """Puts a wrapper around the step, as profilers do."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.wrap)

    def wrap(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        self.before = before = pl_module.training_step

        @functools.wraps(before)
        def step(*args: Any, **kwargs: Any) -> Any:
            return before(*args, **kwargs)

        pl_module.training_step = step  # type: ignore[method-assign]


@pytest.mark.filterwarnings("error:.*training_step was replaced")
@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start"])
@pytest.mark.parametrize("first", [True, False])
def test_a_callback_that_wraps_the_step(hook: str, first: bool) -> None:
    module = Module()
    callbacks = [SFRCallback(LAYERS, warmup_steps=8), Wrapping(hook)]
    trainer(*(callbacks if first else reversed(callbacks))).fit(module, DATA)
    torch.testing.assert_close(dict(module.net.state_dict()), dict(plain().net.state_dict()))


@pytest.mark.parametrize("what", ["alone", "in a list", "another type", "from its batch"])
def test_examples_of_other_kinds(what: str) -> None:
    """What Lightning's summary takes is taken."""
    module = Module()
    if what == "in a list":
        module.example_input_array = [torch.zeros(1, 1, 8, 8)]
    if what == "another type":
        module.scale = nn.Parameter(torch.ones((), dtype=torch.float64), requires_grad=False)
        module._parameters = dict(reversed(module._parameters.items()))
    if what == "from its batch":
        module.example_input_array = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
        module.on_after_batch_transfer = lambda batch, n: (  # type: ignore[method-assign]
            batch.float() if isinstance(batch, Tensor) else batch
        )
    callback = SFRCallback(LAYERS, channel_mode="project")
    trainer(callback).fit(module, DATA)
    assert callback.state_dict()["projections.pair0"].shape == (8, 4, 1, 1)


def test_a_callback_of_a_fit_that_is_running_is_refused_by_another() -> None:
    class Inner(L.Callback):
        def on_train_batch_end(self, trainer_, pl_module, *args):
            trainer(trainer_.callbacks[0]).fit(Module(), DATA)

    module = Module()
    with pytest.raises(RuntimeError, match="expected a callback of its own for a Trainer within the fit of another"):
        trainer(SFRCallback(LAYERS), Inner()).fit(module, DATA)
    assert is_clean(module)


def test_a_trainer_without_the_callback_trains_without_it() -> None:
    """On the same module, within the fit of another."""
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            seen.append(float(outputs["loss"]))

    class Inner(L.Callback):
        def on_train_start(self, trainer_, pl_module):
            before = copy.deepcopy(pl_module.net.state_dict())
            trainer(Look()).fit(pl_module, DATA)
            pl_module.net.load_state_dict(before)
            pl_module.smooth.steps.zero_()
            pl_module.trainer = trainer_

    callback = SFRCallback(LAYERS)
    trainer(callback, Inner()).fit(Module(), DATA)
    assert seen == losses(Module()) and int(callback.state_dict()["steps"]) == 4


def test_attributes_of_the_step_are_its_own() -> None:
    class Marked(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)

    for name in ("callbacks", "module", "plain", "before"):
        setattr(Marked.training_step, name, "mine")
    module = Marked()
    trainer(SFRCallback(LAYERS, warmup_steps=8)).fit(module, DATA)
    torch.testing.assert_close(dict(module.net.state_dict()), dict(plain().net.state_dict()))


def test_folds(tmp_path: Path) -> None:
    """A module each, the best checkpoint tested; each fold begins anew."""
    for mode in ("match", "project"):
        callback = SFRCallback(LAYERS, channel_mode=mode)
        for _ in range(2):
            save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, monitor="test")
            fitting = trainer(callback, save, enable_checkpointing=True)
            module = Judged()
            fitting.fit(module, DATA, DATA)
            assert int(callback.state_dict()["steps"]) == 4
            fitting.test(module, DATA, ckpt_path="best", verbose=False)


class Through(Module):
    """Whose forward does not pass through all layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net[0](x)


def test_projections_that_the_example_does_not_make_are_refused() -> None:
    module = Through()
    with pytest.raises(RuntimeError, match="in evaluation mode, to pass through all of 'net.0', 'net.1', since"):
        trainer(SFRCallback(LAYERS, channel_mode="project")).fit(module, DATA)
    assert is_clean(module)


def test_projections_of_a_module_that_is_compiled_in_place() -> None:
    modules = Module(), Module()
    modules[0].compile(backend="eager")
    for module in modules:
        torch.manual_seed(0)
        trainer(SFRCallback(LAYERS, channel_mode="project")).fit(module, DATA)
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict())


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_further_fit_in_another_precision(precision: Any) -> None:
    """The first one leaves the module converted."""
    module, callback = Module(), SFRCallback(LAYERS, channel_mode="project")
    for _ in range(2):
        trainer(callback, precision=precision).fit(module, DATA)
    assert int(callback.state_dict()["steps"]) == 8


class Decorated(Module):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return self.smooth(self.net(batch[0]), batch[1])


def test_a_step_under_a_decorator() -> None:
    """Lightning asks what arguments it has."""
    assert len(losses(Decorated(), SFRCallback(LAYERS))) == 4


class Iterating(Module):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        (images, labels), _, _ = next(dataloader_iter)
        return self.smooth(self.net(images), labels)


def test_a_step_that_is_given_the_iterator() -> None:
    module = Iterating()
    trainer(SFRCallback(LAYERS, warmup_steps=8)).fit(module, DATA)
    torch.testing.assert_close(dict(module.net.state_dict()), dict(plain().net.state_dict()))


class Validated(Module):
    """By the step of training."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation", self.training_step(batch, batch_idx))


def test_a_validation_by_the_step_of_training_has_no_loss_of_sfr() -> None:
    module = Validated()
    fitting = trainer(SFRCallback(LAYERS))
    fitting.fit(module, DATA, DATA)
    module.smooth.steps.fill_(4)
    within = fitting.callback_metrics["validation"]
    (after,) = trainer().validate(module, DATA, verbose=False)
    assert float(within) == pytest.approx(after["validation"], rel=1e-6)


@pytest.mark.parametrize("wrong", [lambda loss: loss.detach(), lambda loss: {"loss": float(loss)}, lambda loss: {}])
def test_what_lightning_refuses_is_refused(wrong: Any) -> None:
    class Wrong(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return wrong(super().training_step(batch, batch_idx))

    found = []
    for callbacks in ([], [SFRCallback(LAYERS)]):
        with pytest.raises(Exception, match=r".") as caught:
            trainer(*callbacks).fit(Wrong(), DATA)
        found.append((type(caught.value), str(caught.value)))
    assert found[0] == found[1]


def test_a_step_that_is_replaced_in_fit_is_warned_of() -> None:
    class Replacing(Module):
        def on_train_start(self) -> None:
            own = super().training_step
            self.training_step = lambda batch, batch_idx: own(batch, batch_idx)  # type: ignore[method-assign]

    with pytest.warns(UserWarning, match="training_step was replaced after fit had begun"):
        trainer(SFRCallback(LAYERS)).fit(Replacing(), DATA)


def test_a_module_that_another_trainer_is_fitting_is_refused() -> None:
    class Inner(L.Callback):
        def on_train_batch_end(self, trainer_, pl_module, *args):
            trainer(SFRCallback(LAYERS)).fit(pl_module, DATA)

    module = Module()
    with pytest.raises(RuntimeError, match="expected a module that no other Trainer is fitting"):
        trainer(SFRCallback(LAYERS), Inner()).fit(module, DATA)
    assert is_clean(module)


def test_a_learning_rate_is_found_with_the_loss_of_sfr() -> None:
    """Lightning tries rates before callbacks are told that fit starts."""
    calls = []

    class Counting(SelfFeatureRegularizer):
        def loss(self) -> Tensor:
            calls.append(1)
            return super().loss()

    finder = L.pytorch.callbacks.LearningRateFinder(num_training_steps=3, update_attr=False)
    callback = SFRCallback(LAYERS, warmup_steps=8)
    module = Module()
    module.lr = 0.1  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfr_ext.lightning.callback.SelfFeatureRegularizer", Counting)
        trainer(finder, callback).fit(module, DATA)
    assert len(calls) == 3 + 4
    torch.testing.assert_close(dict(module.net.state_dict()), dict(plain().net.state_dict()))
    assert int(callback.state_dict()["steps"]) == 4


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy"])
def test_sharded_projections_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fitting = trainer(SFRCallback(LAYERS, channel_mode="project"))
    strategy = type(name, (type(fitting.strategy),), {})
    fitting.strategy.__class__ = strategy
    with pytest.raises(ValueError, match=f"one device or DDP for channel_mode=.project., got {name}"):
        fitting.fit(Module(), DATA)


class Second(SFRCallback):
    pass


@pytest.mark.parametrize("kind", [SFRCallback, Second])
@pytest.mark.parametrize("mode", ["match", "project"])
def test_two_callbacks(kind: type[SFRCallback], mode: str, tmp_path: Path) -> None:
    """Half of the loss twice is the whole; the smoothing is stepped once."""

    def pair(weight: float = 0.5) -> list[SFRCallback]:
        distances: list[Any] = ["l2", lambda student, teacher: (student.unsqueeze(1) - teacher).norm(dim=-3).mean()]
        return [
            each(LAYERS, weight=weight, warmup_steps=8, channel_mode=mode, distance=distance)
            for each, distance in zip((SFRCallback, kind), distances, strict=True)
        ]

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "sfr" in name}
            one, two = metrics["sfr/net.0-net.1"], metrics["sfr/net.0-net.1-2"]
            ramp = 0.5 * min(1, trainer.global_step / 8)
            assert metrics["sfr/loss"] == pytest.approx(ramp * (one + two), rel=1e-5)

        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / f"epoch{trainer.current_epoch}.ckpt")

    module = Module()
    torch.manual_seed(1)
    callbacks = pair()
    trainer(*callbacks, Look(), max_epochs=2).fit(module, DATA)
    assert is_clean(module) and all(callback.regularizer is None for callback in callbacks)
    assert int(module.smooth.steps) == 8
    assert [int(state["steps"]) for state in states(tmp_path / "epoch0.ckpt")] == [4, 4]
    if mode == "match":
        whole = Module()
        trainer(SFRCallback(LAYERS, warmup_steps=8, distance="l2"), max_epochs=2).fit(whole, DATA)
        torch.testing.assert_close(module.state_dict(), whole.state_dict())
    resumed = Module()
    trainer(*pair(), max_epochs=2).fit(resumed, DATA, ckpt_path=tmp_path / "epoch0.ckpt")
    torch.testing.assert_close(resumed.state_dict(), module.state_dict())


def test_two_callbacks_of_a_killed_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Failing()
    callbacks = SFRCallback(LAYERS), SFRCallback(LAYERS, distance="l2")
    module.error = ValueError("bad batch")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="bad batch"):
        patch.setattr(SFRCallback, "on_exception", lambda *args: None)
        trainer(*callbacks).fit(module, DATA)
    module.error = None
    wanted = losses(Failing(), SFRCallback(LAYERS), SFRCallback(LAYERS, distance="l2"))
    assert losses(module, *callbacks) == wanted
    assert is_clean(module)
    assert losses(module, callbacks[1]) == losses(Failing(), SFRCallback(LAYERS, distance="l2"))


def test_projections_are_in_the_optimiser() -> None:
    class Look(L.Callback):
        moved = False

        def on_train_start(self, trainer, module):
            self.before = copy.deepcopy(dict(module.self_feature_regularizer.named_parameters()))

        def on_train_end(self, trainer, module):
            after = dict(module.self_feature_regularizer.named_parameters())
            self.moved = all(not torch.equal(after[name], p) for name, p in self.before.items()) and len(after) == 1

    look = Look()
    trainer(SFRCallback(LAYERS, channel_mode="project"), look).fit(Module(), DATA)
    assert look.moved


def test_parts_in_evaluation_stay_in_evaluation_where_projections_are_made() -> None:
    module = Module()
    frozen = next(iter(module.children())).eval()
    module.train()
    frozen.eval()
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            seen.append((pl_module.training, frozen.training))

    trainer(SFRCallback(LAYERS, channel_mode="project"), Watch()).fit(module, DATA)
    assert set(seen) == {(True, False)}


def test_pairs_are_the_same_in_lists_and_tuples() -> None:
    pairs = [("a", "b"), ("a", "c")]
    keys = {SFRCallback(["a", "b", "c"], pairs=p).state_key for p in (pairs, tuple(pairs), [list(p) for p in pairs])}
    assert len(keys) == 1


def test_projections_that_no_optimiser_has_are_refused() -> None:
    module = Module()
    module.configure_optimizers = lambda: torch.optim.SGD(module.net.parameters(), lr=0.1)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="configure_optimizers to take the parameters of the projections"):
        trainer(SFRCallback(LAYERS, channel_mode="project")).fit(module, DATA)


def test_projections_need_an_example() -> None:
    module = Module()
    module.example_input_array = None
    with pytest.raises(ValueError, match="example_input_array"):
        trainer(SFRCallback(LAYERS, channel_mode="project")).fit(module, DATA)


def test_manual_optimisation_is_refused() -> None:
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic optimisation"):
        trainer(SFRCallback(LAYERS)).fit(module, DATA)


def test_an_unknown_layer_is_told_when_fit_begins() -> None:
    with pytest.raises(ValueError, match="net.0"):
        trainer(SFRCallback(["net.O", "net.1"])).fit(Module(), DATA)


def test_mixed_precision() -> None:
    module = Module()
    trainer(SFRCallback(LAYERS, warmup_steps=8), precision="bf16-mixed").fit(module, DATA)
    for ours, theirs in zip(module.net.parameters(), plain().net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
