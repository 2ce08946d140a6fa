"""Pictures of a matching: that they show the plan and its cost, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sfr_ext
from sfr_ext import cli, plot
from sfr_ext.plot.canvas import centres, colours, coupling_of, grid_of, picture

pytest.importorskip("matplotlib", reason="the extra [plot] is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


def features(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape)))


def lines_of(figure: Any) -> Any:
    (lines,) = [c for axes in figure.axes for c in axes.collections if type(c).__name__ == "LineCollection"]
    return lines


# What is drawn


@pytest.mark.parametrize("options", [{"solver": "exact"}, {"eps": 0.05, "tol": 1e-7}, {"eps": 1.0, "reach": 0.5}])
def test_costs_are_those_of_the_plan(options: dict[str, Any]) -> None:
    """Read off the plan alone: with it, they sum to the transport cost."""
    x, y = features(2, 6, 4, 5).double(), 2 * features(2, 6, 3, 3).double()
    result = sfr_ext.solve_sample(x, y, **options)
    cost = sfr_ext.cost_matrix(x.flatten(2).mT, y.flatten(2).mT)
    for problem in range(2):
        plan, moved = coupling_of("test", result, problem)
        np.testing.assert_allclose(plan, result.plan[problem], atol=1e-12)
        np.testing.assert_allclose(moved, plan * cost[problem].numpy(), atol=1e-6)
        assert moved.sum() == pytest.approx(float(result.transport_cost[problem]), rel=1e-5)


def test_groups_are_averaged() -> None:
    result = sfr_ext.solve_sample(features(2, 4, 3, 3), features(2, 3, 4, 3, 3).flip(0), solver="exact")
    np.testing.assert_allclose(coupling_of("test", result, 1)[0], result.plan[1].mean(0), atol=1e-7)


def test_a_mirrored_image_has_lines_to_mirrored_places() -> None:
    x = features(1, 8, 4, 6)
    result = sfr_ext.solve_sample(x, x.flip(3), solver="exact")
    figure = plot.matches(features(3, 40, 60), features(3, 40, 60).flip(2), result)
    curves = np.array(lines_of(figure).get_segments())
    assert len(curves) == 24
    begin, end = curves[:, 0], curves[:, -1]
    np.testing.assert_allclose(begin[:, 1], end[:, 1], atol=1e-9)  # the same row
    np.testing.assert_allclose(begin[:, 0] + end[:, 0], 2 + plot.canvas.GAP, atol=1e-9)
    # Patches on the right have the colours of those that they come from.
    ours, theirs = [c for c in figure.axes[0].collections if type(c).__name__ == "PathCollection"]
    mirrored = colours((4, 6)).reshape(4, 6, 3)[:, ::-1].reshape(-1, 3)
    np.testing.assert_allclose(theirs.get_facecolor()[:, :3], mirrored, atol=1e-9)
    np.testing.assert_allclose(ours.get_facecolor()[:, :3], colours((4, 6)), atol=1e-9)


def test_heavier_lines_are_wider_and_light_ones_left_out() -> None:
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    result = sfr_ext.solve(cost, eps=0.7, eps_scale="absolute")
    heavy, light = float(result.plan[0, 0]), float(result.plan[0, 1])
    widths = lines_of(
        plot.matches(features(8, 8), features(8, 8), result, grid_a=(1, 2), grid_b=(2, 1))
    ).get_linewidths()
    assert len(widths) == 4 and widths[-1] > widths[0] and np.all(np.diff(widths) >= 0)
    share = light / heavy
    for least, count in ((0.9 * share, 4), (1.1 * share, 2)):
        figure = plot.matches(features(8, 8), features(8, 8), result, grid_a=(1, 2), grid_b=(2, 1), least=least)
        assert len(lines_of(figure).get_segments()) == count


def test_the_heat_map_is_the_cost_of_each_patch() -> None:
    x, y = features(1, 4, 3, 4), features(1, 4, 2, 5).flip(1)
    result = sfr_ext.solve_sample(x, y, solver="exact")
    figure = plot.cost(features(30, 40), features(1, 20, 50), result)
    _, ours, _, theirs = figure.axes[0].images
    plan, moved = coupling_of("test", result, 0)
    for drawn, wanted in ((ours, (moved.sum(1) / plan.sum(1)).reshape(3, 4)), (theirs, moved.sum(0) / plan.sum(0))):
        tiles = drawn.get_array()
        np.testing.assert_allclose(tiles[5::10, 5::10].ravel(), wanted.ravel())
        assert drawn.get_alpha() is None  # the colour is the bar's, whatever the image beneath
        assert tiles.mask[::10].all() and tiles.mask[:, ::10].all()  # which is seen around the tiles
        np.testing.assert_allclose(drawn.get_clim(), (0, max(moved.sum(1).max() * 12, moved.sum(0).max() * 10)))


def test_a_heat_map_where_nothing_costs() -> None:
    x = features(1, 4, 3, 3)
    figure = plot.cost(features(9, 9), features(9, 9), sfr_ext.solve_sample(x, x, solver="exact"))
    _, ours, _, theirs = figure.axes[0].images
    assert ours.get_clim() == theirs.get_clim() == (0, 1)
    assert np.array_equal(ours.to_rgba(ours.get_array()), theirs.to_rgba(theirs.get_array()))


def test_a_heat_map_where_patches_are_left_unmatched() -> None:
    cost = torch.tensor([[1.0, 9.0], [9.0, 9.0]])
    result = sfr_ext.solve(cost, solver="exact", reach=2.0)
    figure = plot.cost(features(10, 20), features(10, 20), result, grid_a=(1, 2), grid_b=(1, 2))
    for drawn in figure.axes[0].images[1::2]:
        tiles = drawn.get_array()
        assert not tiles.mask[5, 5] and tiles[5, 5] == 1 and tiles.mask[:, 10:].all()


def test_the_plan() -> None:
    result = sfr_ext.solve(features(3, 5, 7))
    np.testing.assert_allclose(plot.plan(result, problem=2).axes[0].images[0].get_array(), result.plan[2], atol=1e-9)


def test_a_strip_shows_what_stays_and_what_each_place_receives() -> None:
    stays = torch.eye(4) / 4
    swapped = stays[[1, 0, 3, 2]]
    figure = plot.strip(
        features(8, 8), {"a": [stays, swapped]}, (2, 2), titles=["one", "two"], values={"a": [1.0, 2.0]}
    )
    reference, one, two = figure.axes
    assert [axes.get_title() for axes in figure.axes][1:] == ["one", "two"]
    tiles = [axes.images[1].get_array() for axes in (reference, one, two)]
    np.testing.assert_allclose(tiles[0], tiles[1])
    np.testing.assert_allclose(tiles[0][:, ::-1], tiles[2])
    (wedges, dots) = two.collections
    assert len(wedges.get_paths()) == 4 and np.all(dots.get_sizes() == 0)
    (wedges, dots) = one.collections
    assert len(wedges.get_paths()) == 0 and np.all(dots.get_sizes() > 0)


def test_empty_problems_and_grey_ones_are_drawn(tmp_path: Path) -> None:
    """Weights that are all 0, or all mass on one patch."""
    x = features(1, 4, 3, 3)
    for weight in (torch.zeros(1, 9), torch.eye(9)[:1]):
        result = sfr_ext.solve_sample(x, x, weight, weight)
        for figure in (
            plot.overview(features(9, 9), features(9, 9), result, title="t"),
            plot.plan(result),
        ):
            figure.savefig(tmp_path / "a.png")


# Arguments


@pytest.mark.parametrize(
    "image, shape",
    [
        (torch.rand(5, 7), (5, 7, 3)),
        (torch.rand(1, 5, 7), (5, 7, 3)),
        (torch.rand(3, 5, 7), (5, 7, 3)),
        (np.zeros((5, 7, 3), np.uint8), (5, 7, 3)),
        (torch.rand(3, 5, 3), (5, 3, 3)),
        (torch.rand(3, 5, 7).half(), (5, 7, 3)),
    ],
)
def test_images(image: Any, shape: tuple[int, ...]) -> None:
    assert picture("test", "image", image).shape == shape


def test_values_of_images() -> None:
    assert picture("test", "image", np.full((2, 2), 255, np.uint8)).max() == 1.0
    clipped = picture("test", "image", torch.tensor([[-1.0, 0.5], [2.0, float("nan")]]))
    assert clipped[..., 0].tolist() == [[0.0, 0.5], [1.0, 0.0]]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"image_a": torch.rand(4, 5, 7)}, ValueError, r"plot.matches: expected image_a of shape .*\[4, 5, 7\]"),
        ({"image_b": torch.zeros(5, 7, dtype=torch.int64)}, TypeError, "expected image_b to hold bytes or floating"),
        ({"result": torch.rand(3, 3)}, TypeError, "expected result of sfr_ext.solve or solve_sample, got Tensor"),
        ({"problem": 2}, ValueError, "expected problem to be one of 2, got 2"),
        ({"problem": "0"}, TypeError, "expected problem to be an int, got str"),
        ({"grid_a": 5}, ValueError, "expected grid_a to be two numbers with product 5, got 5"),
        ({"image_a": features(1, 3, 4, 4)}, ValueError, r"got shape \[1, 3, 4, 4\]; give image_a\[0\]$"),
        ({"image_b": features(4, 4).to_sparse()}, TypeError, "expected image_b to be dense, got torch.sparse_coo"),
        ({"grid_a": (2, 3)}, ValueError, r"expected grid_a to be two numbers with product 5, got \(2, 3\)"),
        ({}, ValueError, r"expected grid_a \(rows, columns\), since 5 patches are no square"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {
        "image_a": features(4, 4),
        "image_b": features(4, 4),
        "result": sfr_ext.solve(features(2, 5, 4)),
        **change,
    }
    with pytest.raises(error, match=message):
        plot.matches(given.pop("image_a"), given.pop("image_b"), given.pop("result"), **given)


def test_a_strip_of_other_plans() -> None:
    with pytest.raises(TypeError, match="expected plans to be a dict from names to plans, got list"):
        plot.strip(features(4, 4), [torch.eye(4)], (2, 2), titles=["one"])  # type: ignore[arg-type]
    for grid in (2, (2, "2"), {"b": (2, 2)}):
        with pytest.raises(TypeError, match=r"expected grid to be a pair \(rows, columns\), for 'a' too, got "):
            plot.strip(features(4, 4), {"a": [torch.eye(4)]}, grid, titles=["one"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected plans of shape \[4, 4\], got \[3, 3\]"):
        plot.strip(features(4, 4), {"a": [torch.eye(3)]}, (2, 2), titles=["one"])
    with pytest.raises(ValueError, match="expected plans to hold 2 of 'a', got 1"):
        plot.strip(features(4, 4), {"a": [torch.eye(4)]}, (2, 2), titles=["one", "two"])


def test_grids_and_centres() -> None:
    assert grid_of("test", "grid_a", None, (9,)) == (3, 3) and grid_of("test", "grid_a", None, (2, 5)) == (2, 5)
    assert centres((1, 2)).tolist() == [[0.25, 0.5], [0.75, 0.5]]


def test_without_matplotlib() -> None:
    """The package is imported all the same; the first picture says what is missing."""
    code = """if True:
        import sys
        sys.modules["matplotlib"] = None
        import torch, sfr_ext
        from sfr_ext import plot
        try:
            plot.plan(sfr_ext.solve(torch.rand(3, 3)))
        except ImportError as error:
            assert str(error).startswith(
                "sfr_ext.plot needs matplotlib, not installed here: pip install matplotlib (or"
            ), error
            print("told")
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "told\n", done.stderr


def test_matplotlib_is_loaded_by_the_first_picture() -> None:
    code = "import sys, sfr_ext; sfr_ext.plot.matches; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr


# sfr-ext match


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    made = []
    for name, width in (("a.png", 60), ("b.png", 36)):
        levels = np.random.default_rng(width).integers(0, 256, (40, width, 3), dtype=np.uint8)
        image.fromarray(levels).save(tmp_path / name)
        made.append(str(tmp_path / name))
    return made


def test_match_by_pixels(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, magic in (("out.png", b"\x89PNG"), ("out.svg", b"<?xml"), ("out.pdf", b"%PDF")):
        out = tmp_path / "pictures" / name
        assert cli.main(["match", *files, "-o", str(out), "--patches", "6"]) == 0
        assert out.read_bytes().startswith(magic)
        assert "between 4 x 6 and 6 x 5 patches of pixels; wrote" in capsys.readouterr().out
    assert cli.main(["match", files[0], files[0], "-o", str(tmp_path / "same.png")]) == 0
    assert "cost 0.0000 between" in capsys.readouterr().out
    assert cli.main(["match", *files, "-o", str(tmp_path / "entropic.png"), "--eps", "0.1"]) == 0


def test_match_leaves_out_what_is_further_away_than_the_reach(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "out.png"), "--metric", "l1"]
    for reach, said in (("1e-3", ", 100% of the mass left unmatched; wrote"), ("1e6", ", 0% of the mass left")):
        assert cli.main(["match", *files, *out, "--reach", reach]) == 0
        assert said in capsys.readouterr().out
    costs = []
    for metric in ("l1", "l2"):
        assert cli.main(["match", *files, "-o", str(tmp_path / "out.png"), "--metric", metric]) == 0
        costs.append(float(capsys.readouterr().out.split()[1]))
    assert costs[0] > 2 * costs[1] > 0  # 48 numbers a patch


def match_without(blocked: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """`sfr-ext match` where these modules are not installed."""
    code = f"""if True:
        import importlib.util, sys
        from importlib.abc import MetaPathFinder
        class Blocked(MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {blocked.split()!r}:
                    raise ModuleNotFoundError("No module named " + repr(name), name=name)
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *more: None if name in {blocked.split()!r} else find(name, *more)
        sys.meta_path.insert(0, Blocked())
        from sfr_ext import cli
        sys.exit(cli.main(["match", *{arguments!r}]))
        """
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


OF_TRAIN = (
    "lightning pytorch_lightning filelock jsonargparse markdown_it yaml rich sklearn scipy shtab torchvision timm"
)


def test_match_needs_no_more_than_its_extra(files: list[str], tmp_path: Path) -> None:
    arguments = [*files, "-o", str(tmp_path / "out.png")]
    done = match_without(OF_TRAIN, arguments)
    assert done.returncode == 0 and (tmp_path / "out.png").is_file(), done.stderr
    done = match_without(OF_TRAIN, [*arguments, "--checkpoint", "run"])
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("sfr-ext: match --checkpoint needs lightning and filelock, not installed here: pip")
    done = match_without(OF_TRAIN + " matplotlib PIL", arguments)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("sfr-ext: match needs matplotlib and PIL, not installed here: pip install matplotlib")


@pytest.mark.parametrize(
    "more, code, said",
    [
        (["-o", "out.png", "--layer", "layer1"], 2, "--layer needs --checkpoint"),
        (["-o", "out.txt"], 2, "-o: out.txt must end with one of"),
        (["-o", "out.png", "--checkpoint", "nowhere.ckpt"], 1, "--checkpoint: nowhere.ckpt does not exist"),
        (["-o", "/dev/null/out.png"], 1, "/dev/null/out.png cannot be written"),
    ],
)
def test_what_match_cannot_do(
    more: list[str], code: int, said: str, files: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["match", *files, *more]) == code
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


def test_match_of_what_is_no_image(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.png").write_text("no image")
    assert cli.main(["match", files[0], str(tmp_path / "bad.png"), "-o", str(tmp_path / "out.png")]) == 1
    assert "bad.png cannot be read: it is no image, or of a format" in capsys.readouterr().err
    (tmp_path / "bad.png").write_bytes(b"")
    assert cli.main(["match", files[0], str(tmp_path / "bad.png"), "-o", str(tmp_path / "out.png")]) == 1
    assert "bad.png cannot be read: it is empty" in capsys.readouterr().err
    assert cli.main(["match", files[0], str(tmp_path / "none.png"), "-o", str(tmp_path / "out.png")]) == 1
    assert "none.png cannot be read: No such file or directory\n" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--eps", "0"], ["--eps", "many"], ["--patches", "0"], []])
def test_wrong_usage_of_match(wrong: list[str], files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["match", *files, *(["-o", "out.png", *wrong] if wrong else [])])
    assert caught.value.code == 2 and "usage: sfr-ext match" in capsys.readouterr().err


# Of a trained network, and while it is trained


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs with --monitor."""
    for name in ("lightning", "sklearn", "jsonargparse", "PIL"):
        pytest.importorskip(name, reason="the extra [train] is not installed")
    out = tmp_path_factory.mktemp("watched")
    few = ["--data", "digits", "--limit", "128", "--batch-size", "64", "--epochs", "2", "--no-progress"]
    assert cli.main(["train", *few, "--monitor", "--out", str(out)]) == 0
    return out


def test_the_monitor_keeps_each_epoch(watched: Path) -> None:
    from PIL import Image

    from sfr_ext.train.config import TrainConfig
    from sfr_ext.train.data import load_data
    from sfr_ext.train.trained import load_trained

    names = [path.name for path in sorted((watched / "monitor").iterdir())]
    assert names == ["epoch-0000.npz", "epoch-0001.npz", "epoch-0002.npz"]
    width, height = Image.open(watched / "monitor.png").size
    assert width > height / 2 > 0
    kept = dict(np.load(watched / "monitor" / names[-1]))
    pairs = ["layer1 - layer2", "layer1 - layer3", "layer2 - layer3"]
    assert set(kept) == {f"{what} {pair}" for what in ("plan", "cost", "grid") for pair in pairs}
    assert kept["plan layer1 - layer2"].shape == (16, 16) and kept["grid layer2 - layer3"].tolist() == [2, 2]
    # They are those of the trained network, for the first test image.
    trained = load_trained(watched)
    data = load_data(TrainConfig())
    x = trained.normalised(data.test_images[:1] / 255)
    with torch.no_grad():
        first = torch.nn.functional.relu(trained.model.bn1(trained.model.conv1(x)))
        layer1 = trained.model.layer1(first)
        layer2 = trained.model.layer2(layer1)
    student = sfr_ext.sfr.maps.unit(torch.nn.functional.avg_pool2d(layer1, 2))
    teacher = sfr_ext.sfr.maps.unit(sfr_ext.group_channels(layer2, 16))
    result = sfr_ext.solve_sample(student, teacher, eps=0.05)
    np.testing.assert_allclose(kept["plan layer1 - layer2"], result.plan[0].mean(0), atol=1e-4)
    assert kept["cost layer1 - layer2"] == pytest.approx(float(result.transport_cost.mean()), rel=1e-4)


@pytest.mark.parametrize("arm", ["sfr", "ce"])
def test_watching_changes_nothing(arm: str, watched: Path, tmp_path: Path) -> None:
    import kill_runs

    from sfr_ext.train.config import TrainConfig
    from sfr_ext.train.run import run

    few = {"data": "digits", "limit": 128, "batch_size": 64, "epochs": 2, "progress": False, "arm": arm}
    for name, monitor in (("with", True), ("without", False)):
        run(TrainConfig(**few, monitor=monitor, out=tmp_path / name))
    assert kill_runs.same(kill_runs.end_of(tmp_path / "with"), kill_runs.end_of(tmp_path / "without"))
    assert not (tmp_path / "without" / "monitor.png").exists()


def test_another_run_takes_the_old_strip_away(watched: Path, tmp_path: Path) -> None:
    import shutil

    from sfr_ext.train.config import TrainConfig
    from sfr_ext.train.run import run

    out = tmp_path / "copy"
    shutil.copytree(watched, out)
    run(TrainConfig(limit=64, batch_size=64, epochs=1, progress=False, arm="ce", overwrite=True, out=out))
    assert not (out / "monitor").exists() and not (out / "monitor.png").exists()


def test_match_by_a_trained_layer(
    watched: Path, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out.png")
    assert cli.main(["match", *files, "-o", out, "--checkpoint", str(watched), "--layer", "layer2"]) == 0
    assert "between 4 x 4 and 4 x 4 patches of layer2 of" in capsys.readouterr().out
    assert cli.main(["match", *files, "-o", out, "--checkpoint", str(watched / "checkpoints" / "last.ckpt")]) == 0
    assert "between 2 x 2 and 2 x 2 patches of layer3 of" in capsys.readouterr().out
    assert cli.main(["match", *files, "-o", out, "--checkpoint", str(watched), "--layer", "layer4"]) == 1
    assert "no layer 'layer4' returns maps of these images; near to it: layer3" in capsys.readouterr().err


def test_monitor_of_a_network_without_known_stages(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="the extra [train] is not installed")
    from torch import nn

    from sfr_ext.train import run as run_module
    from sfr_ext.train.config import TrainConfig
    from sfr_ext.train.errors import TrainError

    few = {"data": "digits", "limit": 64, "batch_size": 64, "epochs": 1, "progress": False, "arm": "ce"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "build_model", lambda *shape: (nn.Flatten(), None))
        with pytest.raises(TrainError, match="--monitor with --arch resnet8 needs --layers"):
            run_module.run(TrainConfig(**few, monitor=True, out=tmp_path))
    with pytest.raises(TrainError, match="--layers.*'layer9'"):
        run_module.run(TrainConfig(**few, monitor=True, layers=("layer1", "layer9"), out=tmp_path))
    with pytest.raises(TrainError, match="--layers.*'fc'"):
        run_module.run(TrainConfig(**few, monitor=True, layers=("layer1", "fc"), out=tmp_path))
