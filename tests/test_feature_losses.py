"""What the feature losses share: grids, tokens, projections, distances, transforms; FeatureDistiller."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfr_ext import FeatureDistiller, SelfFeatureRegularizer, emd_l2, layouts, self_feature_loss
from sfr_ext.sfr.maps import pool, unit


def maps(*shapes):
    return [torch.rand(2, *shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(
    "first, second, max_grid, grid",
    [
        ((14, 14), (7, 7), 7, (7, 7)),
        ((28, 28), (14, 14), 7, (7, 7)),
        ((28, 28), (14, 14), None, (14, 14)),
        ((5, 9), (10, 4), 7, (5, 4)),  # growing with depth is no error
        ((16, 4), (9, 4), 3, (3, 3)),
    ],
)
def test_both_maps_are_averaged_to_one_grid(first, second, max_grid, grid):
    shallow, deep = maps((4, *first), (8, *second))
    ours = self_feature_loss([shallow, deep], max_grid=max_grid, solver="exact")
    pooled = [F.adaptive_avg_pool2d(x, grid) for x in (shallow, deep.detach())]
    theirs = emd_l2(unit(pooled[0]), unit(pooled[1].unflatten(1, (2, 4))), solver="exact")
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad(loss, shallow)[0] for loss in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


def test_tokens_are_compared_as_they_are():
    shallow, deep = maps((12, 8), (10, 8))
    ours = self_feature_loss([shallow, deep], solver="exact")
    theirs = emd_l2(F.normalize(shallow, dim=-1), F.normalize(deep.detach(), dim=-1), solver="exact")
    torch.testing.assert_close(ours, theirs)


def test_too_many_tokens_are_refused_unless_the_cap_is_off():
    features = maps((50, 8), (50, 8))
    with pytest.raises(ValueError, match=r"at most 7 x 7 tokens.*layouts.tokens"):
        self_feature_loss(features)
    self_feature_loss(features, max_grid=None)


EMPTY = [[(4, 0, 4), (8, 4, 4)], [(4, 4, 4), (8, 4, 0)], [(0, 8), (4, 8)], [(4, 8), (4, 0)], [(0, 4, 4), (8, 4, 4)]]


@pytest.mark.parametrize("options", [{}, {"distance": "l2"}, {"channel_mode": "crop"}, {"normalize": False}])
@pytest.mark.parametrize("shapes", EMPTY)
def test_empty_axes_are_refused(shapes, options):
    name = next(str(i) for i, shape in enumerate(shapes) if 0 in shape)
    with pytest.raises(ValueError, match=f"layer '{name}' to give no empty axis but the batch, got"):
        self_feature_loss(maps(*shapes), **options)


@pytest.mark.parametrize("mode", ["match", "project"])
def test_empty_axes_of_layers_are_refused(mode):
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Sequential(nn.Conv2d(4, 8, 1), nn.AvgPool2d(2)))
    for make in (
        lambda: SelfFeatureRegularizer(model, ["0", "1"], channel_mode=mode),
        lambda: FeatureDistiller(model, model, {"0": "1"}, channel_mode=mode),
    ):
        with make() as loss, pytest.raises(ValueError, match="layer '1' to give no empty axis but the batch"):
            cut = layouts.compose(lambda x: x[:, :, :0])
            loss._transforms = loss._teacher_transforms = {"1": cut, "0": None}
            model(torch.rand(2, 1, 4, 4))
            loss.loss()


def test_an_empty_batch_has_no_mean():
    """As `emd_l2` has it, and torch."""
    features = [torch.rand(0, 4, 4, 4), torch.rand(0, 8, 4, 4)]
    assert self_feature_loss(features).isnan() and emd_l2(features[0], features[0]).isnan()


def test_distances():
    shallow, deep = maps((4, 6, 6), (8, 6, 6))
    student, teacher = unit(shallow), unit(deep.detach().unflatten(1, (2, 4)))
    pointwise = (student[:, None] - teacher).norm(dim=2).mean()
    torch.testing.assert_close(self_feature_loss([shallow, deep], distance="l2"), pointwise)

    def squared(ours, theirs):
        assert ours.shape == (2, 4, 6, 6) and theirs.shape == (2, 2, 4, 6, 6)
        return (ours[:, None] - theirs).square().mean()

    wanted = (student[:, None] - teacher).square().mean()
    torch.testing.assert_close(self_feature_loss([shallow, deep], distance=squared), wanted)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"distance": "l2", "eps": 0.1}, TypeError, "'eps' with distance=.emd. only"),
        ({"distance": "l1"}, ValueError, "got 'l1'"),
        ({"distance": lambda s, t: 1.0}, ValueError, "scalar Tensor, got float"),
        ({"distance": "l2", "weighting": "cross-reference"}, ValueError, "weighting"),
        ({"max_grid": 0}, ValueError, "max_grid to be at least 1, got 0"),
        ({"max_grid": 7.0}, TypeError, "max_grid to be an int, got float"),
        ({"channel_mode": "project"}, ValueError, "has parameters"),
        ({"pairs": [("1", "0")]}, ValueError, "in the order of features"),
        ({"pairs": [("0", "5")]}, ValueError, "names from features"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        self_feature_loss(maps((4, 6, 6), (8, 6, 6)), **options)


def net(*widths):
    torch.manual_seed(0)
    layers = [nn.Conv2d(fan_in, fan_out, 3, 2, 1) for fan_in, fan_out in zip((1, *widths), widths, strict=False)]
    return nn.Sequential(*layers)


# Projections


def test_projections_are_made_by_one_forward_and_learn():
    model = net(4, 6, 9)
    sfr = SelfFeatureRegularizer(model, ["0", "1", "2"], channel_mode="project")
    images = torch.rand(2, 1, 16, 16)
    assert not list(sfr.parameters())
    model(images)
    assert [tuple(p.shape) for p in sfr.parameters()] == [(6, 4, 1, 1), (9, 4, 1, 1), (9, 6, 1, 1)]
    model(images)
    sfr.loss().backward()
    assert all(p.grad.abs().sum() > 0 for p in sfr.parameters())
    other = SelfFeatureRegularizer(net(4, 6, 9), ["0", "1", "2"], channel_mode="project")
    other.load_state_dict(sfr.state_dict())  # before any forward
    assert all(map(torch.equal, other.parameters(), sfr.parameters()))


def test_loss_says_that_projections_have_not_been_made():
    model = net(4, 6)
    sfr = SelfFeatureRegularizer(model, ["0", "1"], channel_mode="project")
    model[1](model[0](torch.rand(2, 1, 8, 8)))  # the model itself is not called
    with pytest.raises(RuntimeError, match="projections have not been made"):
        sfr.loss()


def test_attached_it_belongs_to_the_model_until_it_is_removed():
    model = net(4, 6)
    keys = list(model.state_dict())
    sfr = SelfFeatureRegularizer(model, ["0", "1"], channel_mode="project", attach=True)
    model(torch.rand(2, 1, 8, 8))
    assert "self_feature_regularizer.projections.pair0" in model.state_dict()
    twin = copy.deepcopy(model)
    twin(torch.rand(2, 1, 8, 8))
    twin.self_feature_regularizer.loss().backward()
    with pytest.raises(ValueError, match="without 'self_feature_regularizer'"):
        SelfFeatureRegularizer(model, ["0", "1"], attach=True)
    sfr.remove()
    assert list(model.state_dict()) == keys


def test_values_of_each_pair():
    model = net(2, 4, 8)
    sfr = SelfFeatureRegularizer(model, ["0", "1", "2"], weight=3.0, warmup_steps=10)
    assert sfr.values() == {}
    model(torch.rand(2, 1, 16, 16))
    loss = sfr.loss()
    assert tuple(sfr.values()) == sfr.pairs
    assert not any(value.requires_grad for value in sfr.values().values())
    torch.testing.assert_close(loss, 0.3 * torch.stack(list(sfr.values().values())).mean())


# Transforms


class Outputs(nn.Module):
    """Returns what it is given, as a model of another library would."""

    def __init__(self, wrap):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)
        self.first, self.second = nn.Identity(), nn.Identity()
        self.wrap = wrap

    def forward(self, x):
        x = self.inner(x)
        self.first(self.wrap(x))
        self.second(self.wrap(self.outer(x)))


@pytest.mark.parametrize(
    "wrap, transform",
    [
        (lambda x: x, layouts.tokens()),
        (lambda x: (x, None), layouts.compose(layouts.item(0), layouts.tokens(prefix=1))),
        (lambda x: {"last_hidden_state": x}, layouts.compose(layouts.item("last_hidden_state"), layouts.tokens())),
        (lambda x: x[:, 1:].unflatten(1, (4, 4)), layouts.nhwc),
        (lambda x: x[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2), layouts.nchw),
    ],
)
def test_transforms_of_the_same_tokens(wrap, transform):
    torch.manual_seed(0)
    x = torch.rand(2, 17, 8)
    model = Outputs(wrap)
    sfr = SelfFeatureRegularizer(model, {"first": transform, "second": transform}, solver="exact")
    model(x)
    first = model.inner(x)
    grids = [layouts.tokens()(y) for y in (first, model.outer(first))]
    torch.testing.assert_close(sfr.loss(), self_feature_loss(grids, solver="exact"))


def test_nothing_is_guessed():
    model = Outputs(lambda x: (x, None))
    sfr = SelfFeatureRegularizer(model, ["first", "second"])
    model(torch.rand(2, 17, 8))
    with pytest.raises(TypeError, match=r"'first' to return a Tensor, got tuple \(sfr_ext.layouts.item"):
        sfr.loss()
    sfr = SelfFeatureRegularizer(model := Outputs(lambda x: x), ["first", "second"])
    model(torch.rand(2, 17, 8))
    with pytest.raises(ValueError, match=r"layouts has transforms for other shapes: tokens"):
        sfr.loss()


# Distillation


def test_distiller_by_hand():
    student, teacher = net(4, 8), net(8, 16)
    distiller = FeatureDistiller(student, teacher, {"0": "0", "1": "1"}, solver="exact")
    images = torch.rand(2, 1, 16, 16)
    student(images)
    with torch.no_grad():
        teacher(images)
    loss = distiller.loss()
    x, y = images, images
    wanted = []
    for ours, theirs in zip(student, teacher, strict=True):
        x, y = ours(x), theirs(y)
        a, b = (F.adaptive_avg_pool2d(z, min(7, z.shape[2])) for z in (x, y.detach()))
        wanted.append(emd_l2(unit(a), unit(b.unflatten(1, (2, -1))), solver="exact"))
    torch.testing.assert_close(loss, sum(wanted) / 2)
    assert list(distiller.state_dict()) == ["steps"] and len(list(distiller.modules())) == 1
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_distiller_with_a_teacher_of_tokens_and_projections():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(3, 5)

        def forward(self, images):
            return self.block(torch.rand(len(images), 1 + 16, 3))

    student, teacher = net(4), Tokens().eval().requires_grad_(False)
    distiller = FeatureDistiller(
        student, teacher, {"0": "block"}, teacher_transforms={"block": layouts.tokens()}, channel_mode="project"
    )
    images = torch.rand(2, 1, 16, 16)
    teacher(images)
    student(images)
    assert [tuple(p.shape) for p in distiller.parameters()] == [(5, 4, 1, 1)]
    distiller.loss().backward()
    student(images)
    message = r"sfr_ext.FeatureDistiller.loss: call teacher\(images\) before each loss\(\): .* through 'block' since"
    with pytest.raises(RuntimeError, match=message):
        distiller.loss()


@pytest.mark.parametrize(
    "pairs, options, error, message",
    [
        (["0"], {}, TypeError, "pairs to be a dict {student layer: teacher layer}, got list"),
        ({}, {}, ValueError, "at least one pair"),
        ({"0": 1}, {}, TypeError, "names .str., got int"),
        (
            {"0": "7"},
            {},
            ValueError,
            "expected pairs to name modules of the teacher, Sequential, got '7'",
        ),
        ({"7": "0"}, {}, ValueError, "expected pairs to name modules of the student, Sequential, got '7'"),
        ({"0": "0"}, {"teacher_transforms": {"0": layouts.tokens}}, TypeError, r"write layouts.tokens\(\)"),
        ({"0": "0"}, {"student_transforms": {"1": layouts.nhwc}}, ValueError, "got '1'"),
        ({"0": "0"}, {"teacher_transforms": {"0": 3}}, TypeError, "a function or None, got int"),
    ],
)
def test_bad_distillers(pairs, options, error, message):
    student, teacher = net(4), net(4)
    with pytest.raises(error, match=message):
        FeatureDistiller(student, teacher, pairs, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_a_distiller_says_whose_layer_it_is():
    student, teacher = net(4), net(6)
    distiller = FeatureDistiller(student, teacher, {"0": "0"})
    images = torch.rand(2, 1, 16, 16)
    student(images)
    teacher(images)
    message = (
        "FeatureDistiller.loss: expected the channels of the teacher to be a multiple of the student's "
        r"\(or channel_mode=\"project\" or \"crop\"\), got the student's '0' of shape \[2, 4, .* and the teacher's '0'"
    )
    with pytest.raises(ValueError, match=message):
        distiller.loss()
    with pytest.raises(TypeError, match="expected student to be an nn.Module, got int"):
        FeatureDistiller(1, teacher, {"0": "0"})
    with pytest.raises(TypeError, match="expected teacher to be an nn.Module, got int"):
        FeatureDistiller(student, 1, {"0": "0"})


@pytest.mark.parametrize(
    "features, options, message",
    [
        (((4, 6, 6), (6, 6, 6)), {}, r'multiple .* \(or channel_mode="crop"\), got .*\[2, 6, 6, 6\]$'),
        (((8, 6, 6), (4, 6, 6)), {}, "by a convolution of yours.*are the layers given from shallow to deep"),
        (((4, 6, 6), (4, 6, 7)), {"distance": "l2", "max_grid": None}, None),
        (((4, 6, 6), (36, 4)), {"distance": "l2", "max_grid": None}, "the same places on both sides"),
    ],
)
def test_features_without_hooks_have_no_method(features, options, message):
    """The function is named, not a ``.loss`` that it does not have."""
    if message is None:
        self_feature_loss(maps(*features), **options)
        return
    with pytest.raises(ValueError, match=f"^sfr_ext.self_feature_loss: expected .*{message}"):
        self_feature_loss(maps(*features), **options)


def test_lists_of_arrays_and_nested_tensors():
    with pytest.raises(TypeError, match="layer '1' to be a Tensor, got ndarray; give torch.from_numpy"):
        self_feature_loss([torch.rand(2, 4, 3, 3), torch.rand(2, 4, 3, 3).numpy()])
    ragged = torch.nested.nested_tensor([torch.rand(3, 4), torch.rand(5, 4)])
    with pytest.raises(TypeError, match="layer '0' to be dense, got a nested tensor"):
        self_feature_loss([ragged, ragged])


def test_transforms_are_objects_and_not_their_classes():
    with pytest.raises(TypeError, match=r"transforms to be functions, got the class tokens; write layouts.tokens\(\)"):
        layouts.compose(layouts.item(0), layouts.tokens)
    ragged = torch.nested.nested_tensor([torch.rand(3, 4), torch.rand(5, 4)])
    for transform in (layouts.tokens(), layouts.nhwc, layouts.nchw):
        with pytest.raises(TypeError, match="expected output to be dense, got a nested tensor"):
            transform(ragged)
    with pytest.raises(TypeError, match=r"prefix to be an int, got Tensor; write layouts.tokens\(\)\(output\)"):
        layouts.tokens(torch.rand(2, 17, 4))


@pytest.mark.parametrize("prefix", [17, 18])
def test_too_few_tokens_for_the_prefix(prefix):
    with pytest.raises(ValueError, match=rf"output with more than {prefix} tokens \(prefix\), got \[2, 17, 4\]"):
        layouts.tokens(prefix)(torch.rand(2, 17, 4))


def test_features_with_channels_last_are_refused_with_a_way_that_a_function_has():
    with pytest.raises(ValueError, match=r"look like \[B, H, W, C\]; give sfr_ext.layouts.nhwc\(map\) of each map$"):
        self_feature_loss(maps((6, 6, 8), (6, 6, 16)))
    with pytest.raises(ValueError, match=r"expected features of at least 2 layers, got \['0'\]"):
        self_feature_loss(maps((4, 6, 6)))


@pytest.mark.parametrize(
    "shape, grid", [((28, 28), 7), ((14, 14), 7), ((12, 9), 3), ((8, 6), (2, 3)), ((40, 40), 4), ((9, 7), 4)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_block_means_are_those_of_torch(shape, grid, dtype) -> None:
    """In values, gradients, second derivatives, under torch.func and compiled."""
    height, width = grid if isinstance(grid, tuple) else (grid, grid)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return pool(x, height, width)

    def theirs(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(x, (height, width))

    x = torch.randn(2, 3, *shape, dtype=dtype, requires_grad=True)
    value = ours(x)
    torch.testing.assert_close(value, theirs(x))
    upstream = torch.randn_like(value)
    torch.testing.assert_close(*(torch.autograd.grad(f(x), x, upstream)[0] for f in (ours, theirs)))
    torch.testing.assert_close(torch.func.vmap(lambda each: ours(each[None])[0])(x), value)
    torch.testing.assert_close(*(torch.func.grad(lambda x, f=f: f(x).square().sum())(x) for f in (ours, theirs)))
    strided = x.detach().to(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(strided), value)
    if dtype == torch.float64:
        assert torch.autograd.gradgradcheck(ours, x[:1, :1].detach().requires_grad_())


def test_block_means_compiled() -> None:
    x = torch.randn(2, 3, 14, 14)
    compiled = torch.compile(lambda x: pool(x, 7, 7), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), pool(x, 7, 7))


@pytest.mark.parametrize("too_early", [True, False])
def test_projections_that_no_optimizer_has(too_early: bool) -> None:
    """Built before the first forward, it misses them in silence; a run that trains them is left alone."""
    student, teacher = nn.Sequential(nn.Conv2d(1, 2, 3)), nn.Sequential(nn.Conv2d(1, 3, 3))
    teacher.requires_grad_(False)
    distiller = FeatureDistiller(student, teacher, {"0": "0"}, channel_mode="project")
    images = torch.rand(1, 1, 5, 5)
    if not too_early:
        student(images), teacher(images)
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(201):
            student(images), teacher(images)
            distiller.loss().backward()
            if step % 4 == 3:  # gradients are accumulated
                optimizer.step()
                optimizer.zero_grad()
    told = [str(warning.message) for warning in caught if "projections" in str(warning.message)]
    assert ["build the optimizer after it" in message for message in told] == [True] * too_early
    assert all(warning.filename == __file__ for warning in caught if "projections" in str(warning.message))
