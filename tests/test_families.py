"""Each family of networks trains with SFR; where a layer needs a transform and has none, the error says which."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, Family, ViT, densenet, mobilenet
from torch import nn

from sfr_ext import FeatureDistiller, SelfFeatureRegularizer, layouts, self_feature_loss

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 16, 16)


def watched(model: nn.Module, family: Family) -> dict[str, torch.Tensor]:
    """Features of one forward, by hooks of the test's own."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name, transform):
        return lambda module, args, output: seen.update({name: output if transform is None else transform(output)})

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keep(name, t)) for name, t in family.layers.items()]
    model(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    for handle in handles:
        handle.remove()
    return seen


def without_parameters(family: Family) -> dict[str, str]:
    return {"channel_mode": "crop" if family.options else "match", "solver": "exact"}


@families
def test_the_features_have_the_shapes_of_maps(family: Family) -> None:
    seen = watched(family.make(), family)
    assert [tuple(x.shape[1:]) for x in seen.values()] == family.shapes


@families
def test_the_loss_is_that_of_the_features(family: Family) -> None:
    model = family.make().eval()
    options = without_parameters(family)
    sfr = SelfFeatureRegularizer(model, family.layers, **options)
    features = watched(model, family)
    torch.testing.assert_close(sfr.loss(), self_feature_loss(features, **options))


@families
def test_a_step_brings_students_nearer_to_their_teachers(family: Family) -> None:
    """To what the teachers were: they move as well, which may undo it (and does where residuals tie both together)."""
    model = family.make().eval()
    options = without_parameters(family)
    sfr = SelfFeatureRegularizer(model, family.layers, **options)
    before = watched(model, family)
    sfr.loss().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
        after = watched(model, family)
    pairs = [({s: before[s], d: before[d]}, {s: after[s], d: before[d]}) for s, d in sfr.pairs]
    old, new = (sum(self_feature_loss(pair[i], **options) for pair in pairs) for i in range(2))
    assert new < old - 1e-6


@pytest.mark.parametrize("name", ["MobileNet", "DenseNet"])
def test_projections_train(name: str, images: torch.Tensor) -> None:
    family = FAMILIES[name]
    model = family.make()
    sfr = SelfFeatureRegularizer(model, family.layers, **family.options)
    model(images)
    optimizer = torch.optim.Adam([*model.parameters(), *sfr.parameters()], lr=1e-2)
    losses = []
    for _ in range(20):
        model(images)
        loss = sfr.loss()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@families
def test_a_teacher_of_any_family(family: Family, images: torch.Tensor) -> None:
    student = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU())
    teacher = family.make().eval().requires_grad_(False)
    last, transform = list(family.layers.items())[-1]
    distiller = FeatureDistiller(
        student, teacher, {"1": last}, teacher_transforms={last: transform}, channel_mode="project"
    )
    student(images), teacher(images)
    student(images)
    with torch.no_grad():
        teacher(images)
    distiller.loss().backward()
    assert student[0].weight.grad.abs().sum() > 0 and all(p.grad is None for p in teacher.parameters())


# Without the transform


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("ViT", ValueError, r"\[4, 17, 12\] .*tokens for \[B, N, C\]"),
        ("DeiT", ValueError, r"\[4, 18, 12\] .*tokens for \[B, N, C\]"),
        ("Swin", ValueError, r"look like \[B, H, W, C\].*layouts.nhwc"),
        ("tuple", TypeError, r"got tuple \(sfr_ext.layouts.item"),
        ("dict", TypeError, r"got dict \(sfr_ext.layouts.item"),
        ("model output", TypeError, r"got Output \(sfr_ext.layouts.item"),
    ],
)
def test_the_error_names_the_transform(name: str, error: type[Exception], message: str, images: torch.Tensor) -> None:
    family = FAMILIES[name]
    model = family.make()
    sfr = SelfFeatureRegularizer(model, list(family.layers))
    model(images)
    with pytest.raises(error, match=message):
        sfr.loss()


@pytest.mark.parametrize("make, layers", [(mobilenet, "012"), (densenet, "13")])
def test_channels_that_do_not_divide(make, layers: str, images: torch.Tensor) -> None:
    """The error names the ways out; "crop" and "project" take them, "mean" needs groups as "match" does."""
    for mode in ("match", "mean"):
        model = make()
        sfr = SelfFeatureRegularizer(model, list(layers), channel_mode=mode)
        model(images)
        with pytest.raises(ValueError, match='multiple of the shallow.*channel_mode="project" or "crop"'):
            sfr.loss()
    model = make()
    sfr = SelfFeatureRegularizer(model, list(layers), channel_mode="crop")
    model(images)
    sfr.loss().backward()


def test_a_wrong_number_of_prefix_tokens_leaves_no_square(images: torch.Tensor) -> None:
    """DeiT's 2 + 16 tokens with one dropped are 17: a grid says how many there are to be."""
    model = ViT(2)
    sfr = SelfFeatureRegularizer(model, {"blocks.0": layouts.tokens(1, (4, 4)), "blocks.2": layouts.tokens(1, (4, 4))})
    model(images)
    with pytest.raises(ValueError, match=r"1 \+ 4 x 4 tokens \(prefix \+ grid\), got \[4, 18, 12\]"):
        sfr.loss()


# A module that is called twice


class Twice(nn.Module):
    """A block with shared weights: the second call sees the output of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.block(self.stem(x)))


@pytest.mark.parametrize("role", ["deep", "shallow"])
def test_of_two_calls_the_last_counts(role: str, images: torch.Tensor) -> None:
    model = Twice()
    sfr = SelfFeatureRegularizer(model, ["stem", "block"] if role == "deep" else ["block", "stem"], solver="exact")
    model(images)
    loss = sfr.loss()
    stem = model.stem(images)
    last = model.block(model.block(stem))
    wanted = self_feature_loss([stem, last] if role == "deep" else [last, stem], solver="exact")
    torch.testing.assert_close(loss, wanted)
    ours, theirs = (torch.autograd.grad(value, model.stem.weight)[0] for value in (loss, wanted))
    torch.testing.assert_close(ours, theirs)


def test_a_network_called_twice_counts_its_last_forward(images: torch.Tensor) -> None:
    """Two views of a batch: the second is compared, within itself and not with the first."""
    model = FAMILIES["CNN"].make().eval()
    sfr = SelfFeatureRegularizer(model, list("012"), solver="exact")
    model(images)
    model(images.flip(3))
    both = sfr.loss()
    model(images.flip(3))
    torch.testing.assert_close(both, sfr.loss())


# Networks of Hugging Face, from small configurations


def test_vit_of_transformers(images: torch.Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=4
    )
    model = transformers.ViTModel(config, add_pooling_layer=False)
    names = [name for name, module in model.named_modules() if type(module).__name__ == "ViTLayer"]
    assert len(names) == 3
    kinds = {type(out) for out in outputs(model, names, images).values()}
    transform = layouts.compose(layouts.item(0), layouts.tokens()) if kinds == {tuple} else layouts.tokens()
    sfr = SelfFeatureRegularizer(model, dict.fromkeys(names, transform), solver="exact")
    hidden = model(images, output_hidden_states=True).hidden_states
    loss = sfr.loss()
    grids = [layouts.tokens()(x) for x in hidden[1:]]
    torch.testing.assert_close(loss, self_feature_loss(grids, solver="exact"))
    loss.backward()


def test_model_outputs_of_transformers(images: torch.Tensor) -> None:
    """A layer that returns a ModelOutput: a whole ViTModel within a classifier."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=4
    )
    model = transformers.ViTForImageClassification(config)
    last = layouts.compose(layouts.item("last_hidden_state"), layouts.tokens())
    embedded = layouts.tokens()
    sfr = SelfFeatureRegularizer(model, {"vit.embeddings": embedded, "vit": last}, solver="exact")
    model(images)
    loss = sfr.loss()
    deep = layouts.tokens()(model.vit(images).last_hidden_state)
    torch.testing.assert_close(loss, self_feature_loss([embedded(model.vit.embeddings(images)), deep], solver="exact"))
    loss.backward()


def test_swin_of_transformers() -> None:
    """Its stages return tuples of tokens without a prefix, on grids that halve."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    model = transformers.SwinModel(config)
    images = torch.rand(2, 3, 32, 32)
    tokens = layouts.compose(layouts.item(0), layouts.tokens(prefix=0))
    names = ["encoder.layers.0", "encoder.layers.1"]
    features = [tokens(output) for output in outputs(model, names, images).values()]
    assert [tuple(x.shape) for x in features] == [(2, 16, 4, 4), (2, 16, 4, 4)]
    model.eval()  # drop path is random
    sfr = SelfFeatureRegularizer(model, dict.fromkeys(names, tokens), solver="exact")
    model(images)
    loss = sfr.loss()
    features = [tokens(output) for output in outputs(model, names, images).values()]
    torch.testing.assert_close(loss, self_feature_loss(features, solver="exact"))
    loss.backward()


def outputs(model: nn.Module, names: list[str], images: torch.Tensor) -> dict[str, object]:
    seen: dict[str, object] = {}
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
        for name in names
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return seen
