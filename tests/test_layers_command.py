"""``sfr-ext layers``: the layers it lists can be compared as it says, in each family of networks."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import families
import pytest
import torch
from torch import nn

import sfr_ext
from sfr_ext import cli, layouts
from sfr_ext.sfr.candidates import candidates, suggestion
from sfr_ext.train.layers import words

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = families.FAMILIES


def listed(model: nn.Module, size: int = 16) -> dict[str, str]:
    return {layer.name: words(layer.transform) for layer in candidates(model, torch.rand(2, 3, size, size))}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_of_each_family_are_found(name: str) -> None:
    family = FAMILIES[name]
    found = listed(family.make())
    for layer, transform in family.layers.items():
        if name == "Swin" and layer == "layers.2":
            assert layer not in found  # one pixel: nothing to transport
        else:
            assert found[layer] == words(transform)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_suggested_can_be_trained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The line of code that it prints, run as it stands."""
    FACTORY["make"] = FAMILIES[name].make
    assert cli.main(["layers", f"{__name__}:made", "--size", "16", "--all"]) == 0
    code = capsys.readouterr().out.rstrip().split("\n")[-1]
    scope = {"sfr_ext": sfr_ext, "layouts": layouts, "model": (model := FAMILIES[name].make())}
    exec(code, scope)
    sfr = scope["sfr"]
    for _ in range(2):  # the first makes projections
        model(torch.rand(2, 3, 16, 16))
    assert torch.isfinite(sfr.loss())


@pytest.mark.parametrize("name", [name for name in FAMILIES if "staged" in name])
def test_stages_within_one_layer_are_suggested(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The last layer of each resolution: not the layer that holds them all, and no block of a stage."""
    family = FAMILIES[name]
    FACTORY["make"] = family.make
    assert cli.main(["layers", f"{__name__}:made", "--size", "16"]) == 0
    code = capsys.readouterr().out.rstrip().split("\n")[-1]
    assert re.findall(r'"(stages[.\d]*)"', code) == list(family.layers)
    found = candidates(family.make(), torch.rand(2, 3, 16, 16))
    assert [layer.shape for layer in suggestion(found)] == family.shapes


def test_that_nothing_is_suggested_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    FACTORY["make"] = lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.Flatten())
    assert cli.main(["layers", f"{__name__}:made", "--size", "8"]) == 0
    assert "\n\nNothing is suggested: " in capsys.readouterr().out


FACTORY: dict[str, object] = {}


def made() -> nn.Module:
    return FACTORY["make"]()


def test_a_resnet(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["layers", "resnet8", "--size", "32", "--channels", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^layer2 +\[2, 32, 16, 16\] +32 x 16 x 16 +-$", out, re.M)
    assert "bn1" not in out
    assert out.endswith('sfr = sfr_ext.SelfFeatureRegularizer(model, ["layer1", "layer2", "layer3"])\n')
    assert cli.main(["layers", "resnet8", "--size", "32", "--channels", "1", "--all"]) == 0
    assert "layer1.0.bn1" in capsys.readouterr().out


def test_the_decoder_of_a_u_net_is_not_suggested() -> None:
    found = candidates(families.UNet(), torch.rand(2, 3, 16, 16))
    assert {"up.0", "up.1"} <= {layer.name for layer in found}
    assert [layer.name for layer in suggestion(found)] == ["down.0", "down.1", "down.2"]


def conv(fan_in: int, fan_out: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(fan_in, fan_out, 3, stride, 1)


def suggested(model: nn.Module, size: int) -> list[str]:
    return [layer.name for layer in suggestion(candidates(model, torch.rand(2, 3, size, size)))]


class Stem(nn.Module):
    """As LeViT: four convolutions, of a resolution each, ahead of three stages."""

    def __init__(self) -> None:
        super().__init__()
        channels = [3, 4, 8, 16, 32]
        self.stem = nn.Sequential(*(conv(a, b, 2) for a, b in zip(channels, channels[1:], strict=False)))
        self.stages = nn.Sequential(
            *(nn.Sequential(conv(32 * i, 32 * (i + 1), min(i, 2)), nn.ReLU()) for i in (1, 2, 3))
        )

    def forward(self, x):
        return self.stages(self.stem(x)).mean((2, 3))


class Branches(nn.Module):
    """As CrossViT and HRNet: branches of two resolutions in each block, returned as a list."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.begin = nn.ModuleList(nn.Sequential(conv(3, 4 * n, 2 * n), nn.ReLU()) for n in (1, 2))
        self.blocks = nn.Sequential(*(_Exchange() for _ in range(blocks)))

    def forward(self, x):
        return self.blocks([branch(x) for branch in self.begin])[0].mean((2, 3))


class _Exchange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(conv(4 * n, 4 * n, 1), nn.ReLU()) for n in (1, 2))
        self.up, self.down = nn.Conv2d(8, 4, 1), conv(4, 8, 2)

    def forward(self, x):
        fine, coarse = (branch(part) for branch, part in zip(self.branches, x, strict=True))
        return [fine + nn.functional.interpolate(self.up(coarse), scale_factor=2), coarse + self.down(fine)]


def test_a_stem_is_not_taken_for_the_stages() -> None:
    assert suggested(Stem(), 96) == ["stages.0", "stages.1", "stages.2"]


def test_branches_that_run_beside_each_other_are_not_suggested() -> None:
    assert suggested(Branches(3), 16) == ["blocks.0", "blocks.1", "blocks.2"]
    assert not any("branches" in name for name in suggested(Branches(1), 16))


@pytest.mark.parametrize("size", [16, 32, 64])
def test_channels_of_a_cube_are_where_those_around_it_have_them(size: int) -> None:
    """Of images of 32 x 32 the first stage of this Swin has 8 x 8 x 8, which does not say where the channels are."""
    found = candidates(families.Swin(), torch.rand(2, 3, size, size))
    stages = {layer.name: words(layer.transform) for layer in found if layer.shape[1] > 1}
    assert {name: word for name, word in stages.items() if re.fullmatch(r"layers\.\d", name)} == {
        f"layers.{i}": "layouts.nhwc" for i in range(3 if size > 16 else 2)
    }
    assert stages["embed"] == "-"


def test_a_cube_in_a_cnn_needs_no_transform() -> None:
    model = nn.Sequential(nn.Sequential(conv(3, 8, 2), nn.ReLU()), nn.Sequential(conv(8, 16, 2), nn.ReLU()))
    assert listed(model) == {"0": "-", "0.0": "-", "0.1": "-", "1": "-", "1.0": "-", "1.1": "-"}


class Framed(nn.Module):
    """As those of transformers: a network within the classifier, an encoder within that, both with named outputs."""

    def __init__(self, strides: tuple[int, ...], stem: int) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.embeddings = nn.Sequential(nn.Conv2d(3, 8, stem, stem))
        self.body.encoder = _Named(nn.Sequential(nn.Conv2d(8, 8, stride, stride)) for stride in strides)
        self.body.forward = lambda x: {"last_hidden_state": self.body.encoder(self.body.embeddings(x))["last"]}

    def forward(self, x):
        return self.body(x)["last_hidden_state"].mean((2, 3))


class _Named(nn.Module):
    def __init__(self, blocks) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return {"last": x}


@pytest.mark.parametrize(
    "strides, stem, wanted",
    [
        ((1, 2, 2), 2, ["layers.0", "layers.1", "layers.2"]),  # ConvNeXt
        ((1, 1, 1), 4, ["layers.0", "layers.1", "layers.2"]),  # ViT
        ((1,) * 12, 4, ["layers.2", "layers.5", "layers.8", "layers.11"]),
    ],
)
def test_frames_are_not_suggested(strides, stem, wanted, capsys: pytest.CaptureFixture[str]) -> None:
    FACTORY["make"] = lambda: Framed(strides, stem)
    assert cli.main(["layers", f"{__name__}:made", "--size", "16"]) == 0
    code = capsys.readouterr().out
    assert (
        "To begin with:" in code and f"model, {[f'body.encoder.{name}' for name in wanted]})".replace("'", '"') in code
    )


def test_blocks_of_one_size_are_evenly_spaced() -> None:
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, 1, 1) for _ in range(12)))
    assert [layer.name for layer in suggestion(candidates(model, torch.rand(2, 3, 8, 8)))] == ["2", "5", "8", "11"]


@pytest.mark.parametrize("prefix", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("side", [2, 3, 4, 14])
def test_prefix_tokens_are_told_from_patches(prefix: int, side: int) -> None:
    """By the map that the patches come from: 9 + 4 x 4 tokens are 5 x 5 as well."""

    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.block = nn.Conv2d(3, 6, 2, 2), nn.Identity()

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            return self.block(torch.cat((x[:, :1].expand(-1, prefix, -1), x), 1))

    assert listed(Embedding(), 2 * side)["block"] == words(layouts.tokens(prefix))


def test_a_layer_called_twice_says_which_call_counts(capsys: pytest.CaptureFixture[str]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Conv2d(3, 3, 3, 1, 1)

        def forward(self, x):
            return self.block(self.block(x))

    FACTORY["make"] = Twice
    assert cli.main(["layers", f"{__name__}:made", "--size", "8"]) == 0
    assert "2 calls: the last counts" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["resnet9"], "'resnet9' is neither"),
        (["resnet8", "--channels", "1", "--size", "1"], "no layer of resnet8 returns maps"),
        (["nowhere:made"], "No module named 'nowhere'"),
        ([f"{__name__}:absent"], "no attribute 'absent'"),
        ([f"{__name__}:listed"], "missing 1 required positional argument"),
        ([f"{__name__}:number"], "to return an nn.Module, got int"),
        ([f"{__name__}:linear"], "does not take images of 3 x 224 x 224"),
    ],
)
def test_errors(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["layers", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("sfr-ext: ") and error.count("\n") == 1 and said in error


def number() -> int:
    return 3


def linear() -> nn.Module:
    return nn.Linear(5, 5)


def test_a_size_is_a_whole_number(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0", "-3", "1.5", "x"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["layers", "resnet8", f"--size={text}"])
        assert f"above 0, got {text!r}" in capsys.readouterr().err


def test_modules_beside_the_caller_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks.py").write_text("from torch import nn\ndef make():\n    return nn.Conv2d(3, 4, 3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(["layers", "my_networks:make", "--size", "9"]) == 1  # found; but nothing in it has a name
    assert "my_networks" in sys.modules
