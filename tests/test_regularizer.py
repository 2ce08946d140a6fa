"""SelfFeatureRegularizer: values, counting, state, compile, autocast, DDP, copies, errors."""

import copy
import gc
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from processes import in_two_processes, join, leave
from torch import nn

from sfr_ext import (
    EMDL2Loss,
    FeatureDistiller,
    SelfFeatureRegularizer,
    cross_reference_weights,
    emd_l2,
    group_channels,
    layouts,
)


class Net(nn.Module):
    """Maps of 4, 8 and 16 channels; sizes 8, 4 and 2 on images of 8 x 8."""

    def __init__(self, widths=(4, 8, 16)):
        super().__init__()
        first, second, third = widths
        self.layer1 = nn.Sequential(nn.Conv2d(1, first, 3, 1, 1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(first, second, 3, 2, 1), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Conv2d(second, third, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(third, 3)

    def features(self, x):
        first = self.layer1(x)
        second = self.layer2(first)
        return first, second, self.layer3(second)

    def forward(self, x):
        return self.fc(self.features(x)[-1].mean((2, 3)))


LAYERS = ["layer1", "layer2", "layer3"]


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def images():
    return torch.rand(3, 1, 8, 8)


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def by_hand(student, teacher, **options):
    """One pair with the defaults, written out."""
    teacher = group_channels(teacher.detach(), student.shape[1])
    student = F.adaptive_avg_pool2d(student, teacher.shape[-2:])
    return emd_l2(F.normalize(student, dim=1), F.normalize(teacher, dim=2), **options)


# What it computes


def test_all_pairs_by_hand(net, images):
    sfr = SelfFeatureRegularizer(net, LAYERS, weight=2.0, eps=0.1)
    net(images)
    loss = sfr.loss()
    one, two, three = net.features(images)
    pairs = [by_hand(s, d, eps=0.1) for s, d in ((one, two), (one, three), (two, three))]
    torch.testing.assert_close(loss, 2 * sum(pairs) / 3)
    ours = torch.autograd.grad(loss, net.layer1[0].weight)
    theirs = torch.autograd.grad(2 * sum(pairs) / 3, net.layer1[0].weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


class Fixed(nn.Module):
    """A network whose maps are given: shows the arithmetic without a network's own."""

    def __init__(self, shallow, deep):
        super().__init__()
        self.shallow, self.deep = nn.Identity(), nn.Identity()
        self.maps = (shallow, deep)
        self.eval()  # no parameters, and nothing to train

    def forward(self):
        return self.shallow(self.maps[0]), self.deep(self.maps[1])


def pixel(*channels):
    return torch.tensor(channels, dtype=torch.float64).reshape(1, -1, 1, 1)


@pytest.mark.parametrize(
    "mode, normalize, expected",
    [
        # One pixel on each side: the transport cost is the distance. Student (3, 4), groups (0, 5) and (3,
        # 0).
        ("match", False, (10**0.5 + 4) / 2),
        ("mean", False, ((3 - 1.5) ** 2 + (4 - 2.5) ** 2) ** 0.5),
        ("crop", False, 10**0.5),
        ("match", True, ((0.6**2 + 0.2**2) ** 0.5 + (0.4**2 + 0.8**2) ** 0.5) / 2),
        ("crop", True, (0.6**2 + 0.2**2) ** 0.5),
    ],
)
def test_channel_modes_on_one_pixel(mode, normalize, expected):
    model = Fixed(pixel(3, 4), pixel(0, 5, 3, 0))
    sfr = SelfFeatureRegularizer(model, ["shallow", "deep"], channel_mode=mode, normalize=normalize)
    model()
    assert sfr.loss().item() == pytest.approx(expected, rel=1e-6)


def test_cross_reference_weighting(net, images):
    sfr = SelfFeatureRegularizer(net, LAYERS[1:], weighting="cross-reference", eps=0.1)
    net(images)
    loss = sfr.loss()
    _, student, teacher = net.features(images)
    units = F.normalize(F.adaptive_avg_pool2d(student, teacher.shape[-2:]), dim=1)
    groups = F.normalize(group_channels(teacher.detach(), 8), dim=2)
    a, b = cross_reference_weights(units, groups)
    expected = emd_l2(units, groups, student_weight=a, teacher_weight=b, eps=0.1)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value, net.layer2[0].weight)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_shallow_map_is_averaged_to_the_deep_size():
    shallow = torch.tensor([1.0, 2.0, 3.0, 6.0]).reshape(1, 1, 2, 2)
    model = Fixed(shallow, torch.full((1, 1, 1, 1), 10.0))
    sfr = SelfFeatureRegularizer(model, ["shallow", "deep"], normalize=False)
    model()
    assert sfr.loss().item() == pytest.approx(7.0)


def test_sizes_that_do_not_divide():
    shallow, deep = torch.rand(2, 4, 5, 7), torch.rand(2, 4, 2, 3)
    model = Fixed(shallow, deep)
    sfr = SelfFeatureRegularizer(model, ["shallow", "deep"])
    model()
    torch.testing.assert_close(sfr.loss(), by_hand(shallow, deep))


def test_crop_allows_channels_that_do_not_divide():
    model = Fixed(pixel(3, 4), pixel(0, 5, 7))
    sfr = SelfFeatureRegularizer(model, ["shallow", "deep"], normalize=False, channel_mode="crop")
    model()
    assert sfr.loss().item() == pytest.approx(10**0.5)


@pytest.mark.parametrize(
    "pairs, expected",
    [
        ("all", (("layer1", "layer2"), ("layer1", "layer3"), ("layer2", "layer3"))),
        ("last", (("layer1", "layer3"), ("layer2", "layer3"))),
        ([("layer1", "layer3")], (("layer1", "layer3"),)),
    ],
)
def test_pairs(net, images, pairs, expected):
    sfr = SelfFeatureRegularizer(net, LAYERS, pairs=pairs)
    assert sfr.pairs == expected
    net(images)
    maps = dict(zip(LAYERS, net.features(images), strict=True))
    wanted = torch.stack([by_hand(maps[s], maps[d]) for s, d in expected]).mean()
    net(images)
    torch.testing.assert_close(sfr.loss(), wanted)


def test_teacher_is_detached_unless_asked(net, images):
    for detach in (True, False):
        net.zero_grad()
        with SelfFeatureRegularizer(net, LAYERS, pairs=[("layer1", "layer2")], detach_teacher=detach) as sfr:
            net(images)
            sfr.loss().backward()
        assert net.layer1[0].weight.grad.abs().sum() > 0
        assert (net.layer2[0].weight.grad is None) == detach


def test_dead_pixels_give_finite_gradients():
    shallow = torch.rand(1, 2, 2, 2)
    shallow[..., 0, 0] = 0
    shallow[..., 0, 1] = 1e-30
    shallow.requires_grad_()
    deep = torch.rand(1, 4, 2, 2)
    deep[:, :2] = 0
    model = Fixed(shallow, deep)
    sfr = SelfFeatureRegularizer(model, ["shallow", "deep"])
    model()
    sfr.loss().backward()
    assert torch.isfinite(shallow.grad).all()
    assert shallow.grad.abs().max() < 1e4


def test_scale_of_the_features_does_not_matter():
    shallow, deep = torch.rand(2, 4, 4, 4), torch.rand(2, 8, 2, 2)
    values = []
    for scale in (1.0, 1e-4, 1e4):
        model = Fixed(shallow * scale, deep * scale)
        with SelfFeatureRegularizer(model, ["shallow", "deep"]) as sfr:
            model()
            values.append(sfr.loss().item())
    assert values == pytest.approx([values[0]] * 3, rel=1e-4)


# When it counts


def test_warm_up_counts_training_steps_only(net, images):
    sfr = SelfFeatureRegularizer(net, LAYERS, weight=3.0, warmup_steps=4)
    whole = SelfFeatureRegularizer(net, LAYERS, weight=3.0)
    factors = []
    for training in (True, True, False, True, True, True):
        net.train(training)
        net(images)
        net(images)  # a second forward is no second step
        factors.append((sfr.loss() / whole.loss()).item())
    assert factors == pytest.approx([0.25, 0.5, 0.5, 0.75, 1.0, 1.0], rel=1e-6)
    assert sfr.current_weight == 3.0


def test_last_forward_counts(net, images):
    sfr = SelfFeatureRegularizer(net, LAYERS)
    net(images)
    once = sfr.loss()
    net(torch.rand(5, 1, 8, 8))
    net(images)
    assert torch.equal(sfr.loss(), once)


def test_features_are_dropped_after_loss_and_at_the_next_forward(net, images):
    sfr = SelfFeatureRegularizer(net, LAYERS)
    kept = []
    net.layer1.register_forward_hook(lambda m, a, out: kept.append(weakref.ref(out)))
    net(images)
    assert kept[-1]() is not None
    sfr.loss()
    assert kept[-1]() is None
    net(images)
    seen_at_start = []
    net.layer1.register_forward_pre_hook(lambda m, a: seen_at_start.append(kept[-1]()))
    net(images)
    assert seen_at_start == [None]


def test_remove_and_context_manager(net, images):
    with SelfFeatureRegularizer(net, LAYERS) as sfr:
        net(images)
    sfr.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(RuntimeError, match="the hooks were removed"):
        sfr.loss()


def test_hooks_end_with_the_regularizer(net, images):
    sfr = SelfFeatureRegularizer(net, LAYERS)
    net(images)
    del sfr
    gc.collect()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# State, copies


def test_state_round_trip_and_no_model_inside(net, images):
    first = SelfFeatureRegularizer(net, LAYERS, warmup_steps=10)
    for _ in range(3):
        net(images)
        first.loss()
    assert list(first.state_dict()) == ["steps"]
    assert not list(first.parameters()) and len(list(first.modules())) == 1
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = SelfFeatureRegularizer(net, LAYERS, warmup_steps=10)
    second.load_state_dict(torch.load(file, weights_only=True))
    net(images)
    assert torch.equal(first.loss(), second.loss())
    assert second.current_weight == pytest.approx(0.4)


def test_it_may_be_an_attribute_of_its_own_model(net, images):
    net.sfr = SelfFeatureRegularizer(net, LAYERS)
    net.train().to(torch.float64)
    net(images.double())
    assert net.sfr.loss().dtype == torch.float64
    assert "sfr.steps" in net.state_dict()


def test_copies_of_the_model_do_nothing(net, images):
    sfr = SelfFeatureRegularizer(net, LAYERS)
    net(images)  # features are held now: they belong to a graph and cannot be copied
    copied = copy.deepcopy(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    net(images)
    wanted = sfr.loss()
    net(images)
    copied(images * 2)
    loaded(images * 3)
    assert torch.equal(sfr.loss(), wanted)
    assert not copied.layer1._forward_hooks.popitem()[1].capture.features


def test_a_copy_of_both_works_on_its_own(net, images):
    both = nn.ModuleDict({"net": net, "sfr": SelfFeatureRegularizer(net, LAYERS)})
    twin = copy.deepcopy(both)
    twin["net"](images)
    with pytest.raises(RuntimeError, match=r"call model\(images\) before each loss\(\)"):
        both["sfr"].loss()
    both["net"](images)
    assert torch.equal(both["sfr"].loss(), twin["sfr"].loss())


# Autocast, compile, distributed


@pytest.mark.parametrize("normalize", [True, False])
def test_autocast(net, images, normalize):
    sfr = SelfFeatureRegularizer(net, LAYERS, normalize=normalize)
    net(images)
    wanted = sfr.loss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(images)
        loss = sfr.loss()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=0.03, atol=0)
    loss.backward()
    assert torch.isfinite(net.layer1[0].weight.grad).all()


def test_features_of_different_dtypes():
    shallow, deep = torch.rand(2, 2, 2, 2), torch.rand(2, 4, 2, 2)
    for normalize in (True, False):
        values = []
        for dtype in (torch.float32, torch.bfloat16):
            model = Fixed(shallow, deep.to(dtype))
            with SelfFeatureRegularizer(model, ["shallow", "deep"], normalize=normalize) as sfr:
                model()
                values.append(sfr.loss())
        torch.testing.assert_close(values[1], values[0], rtol=0.02, atol=0)


@pytest.mark.parametrize("given", ["model", "compiled model"])
def test_compiled_model(net, images, given):
    def step(call, sfr):
        net.zero_grad()
        loss = F.cross_entropy(call(images), torch.tensor([0, 1, 2])) + sfr.loss()
        loss.backward()
        return loss.detach(), gradients(net)

    with SelfFeatureRegularizer(net, LAYERS, warmup_steps=2) as sfr:
        eager = [step(net, sfr), step(net, sfr)]
    # aot_eager: traced and differentiated as inductor would, without its C++ compiler.
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    sfr = SelfFeatureRegularizer(net if given == "model" else compiled, LAYERS, warmup_steps=2)
    for wanted in eager:
        torch.testing.assert_close(step(compiled, sfr), wanted)
    compiled.eval()
    compiled(images)
    sfr.loss()
    assert sfr.steps == 2
    torch._dynamo.reset()


def test_compiled_before_the_hooks_says_so(net, images):
    compiled = torch.compile(net, backend="eager")
    compiled(images)
    sfr = SelfFeatureRegularizer(compiled, LAYERS)
    compiled(images)
    with pytest.raises(RuntimeError, match=r"graph from before this object was made: call torch.compiler.reset\(\)"):
        sfr.loss()
    torch._dynamo.reset()


def test_a_whole_training_step_compiles(net, images):
    sfr = SelfFeatureRegularizer(net, LAYERS, warmup_steps=2)

    def step(x):
        return net(x).square().mean() + sfr.loss()

    eager = [step(images).detach(), step(images).detach()]
    sfr.steps.zero_()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close([compiled(images).detach(), compiled(images).detach()], eager)
    torch._dynamo.reset()


def _distributed_gradients(rank, folder, images):
    join(rank, folder)
    torch.manual_seed(0)
    net = Net()
    parallel = nn.parallel.DistributedDataParallel(net)
    sfr = SelfFeatureRegularizer(parallel, LAYERS)
    (parallel(images[rank::2]).square().mean() + sfr.loss()).backward()
    leave(gradients(net), rank, folder)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_distributed_data_parallel_in_two_processes(tmp_path):
    images = torch.rand(4, 1, 8, 8)
    both, same = in_two_processes(_distributed_gradients, tmp_path, images)
    assert all(map(torch.equal, both, same))

    torch.manual_seed(0)
    net = Net()
    sfr = SelfFeatureRegularizer(net, LAYERS)
    for rank in range(2):
        ((net(images[rank::2]).square().mean() + sfr.loss()) / 2).backward()
    torch.testing.assert_close(both, gradients(net), rtol=1e-4, atol=1e-6)


# Errors


def test_unknown_layer_lists_close_names(net):
    with pytest.raises(ValueError, match=r"got 'layer4'; near to it: 'layer\d'") as caught:
        SelfFeatureRegularizer(net, ["layer1", "layer4"])
    assert "of Net" in str(caught.value)
    with pytest.raises(ValueError, match=r"got 'zzz'; nothing is near to it; there are '\w+'") as caught:
        SelfFeatureRegularizer(net, ["layer1", "zzz"])
    assert "near to it: " not in str(caught.value)
    with pytest.raises(ValueError, match="got 'yyy'; the model has no submodules"):
        SelfFeatureRegularizer(nn.Identity(), ["yyy", "zzz"])
    assert not any(m._forward_hooks for m in net.modules())


def test_loss_before_any_forward(net, images):
    sfr = SelfFeatureRegularizer(net, LAYERS)
    with pytest.raises(RuntimeError, match=r"call model\(images\) before each loss\(\)"):
        sfr.loss()
    net(images)
    sfr.loss()
    with pytest.raises(RuntimeError, match="'layer1', 'layer2', 'layer3'"):
        sfr.loss()


def test_channels_that_do_not_divide(images):
    net = Net((4, 6, 16))
    for mode in ("match", "mean"):
        with SelfFeatureRegularizer(net, LAYERS, channel_mode=mode) as sfr:
            net(images)
            with pytest.raises(ValueError, match=r"multiple .* 'layer1' of shape \[3, 4, 8, 8\] and 'layer2'"):
                sfr.loss()


def test_layers_from_deep_to_shallow(images):
    net = Net((4, 8, 16))
    for mode in ("match", "mean", "crop"):
        with SelfFeatureRegularizer(net, LAYERS[::-1], channel_mode=mode) as sfr:
            net(images)
            with pytest.raises(ValueError, match=r'.or channel_mode="project".*; are the layers given from shallow to'):
                sfr.loss()
    net = Net((4, 6, 16))
    with SelfFeatureRegularizer(net, LAYERS) as sfr:
        net(images)
        with pytest.raises(ValueError, match=r'.or channel_mode="project" or "crop".*\[3, 6, 4, 4\]$'):
            sfr.loss()


def test_crop_needs_as_many_channels(images):
    net = Net((8, 4, 4))
    sfr = SelfFeatureRegularizer(net, LAYERS, channel_mode="crop")
    net(images)
    with pytest.raises(ValueError, match="no fewer channels"):
        sfr.loss()


def test_wrong_rank_and_kind_of_features(net, images):
    sfr = SelfFeatureRegularizer(net, ["layer1", "fc"])
    net(images)
    with pytest.raises(ValueError, match=r"'fc' to return shape \[B, C, H, W\], got \[3, 3\]"):
        sfr.loss()
    lstm = nn.Sequential(nn.Identity(), nn.LSTM(2, 2))
    sfr = SelfFeatureRegularizer(lstm, ["0", "1"])
    lstm(torch.rand(1, 2, 2))
    with pytest.raises(ValueError, match="layer '0' to return shape"):
        sfr.loss()
    sfr = SelfFeatureRegularizer(lstm, ["1", "0"])
    lstm(torch.rand(1, 2, 2))
    with pytest.raises((TypeError, ValueError), match="layer"):
        sfr.loss()


@pytest.mark.parametrize(
    "layers, options, error, message",
    [
        ("layer1", {}, TypeError, "list of names, got str"),
        (["layer1", 2], {}, TypeError, "hold names .* got int"),
        (["layer1"], {}, ValueError, "at least 2 layers"),
        (["layer1", "layer1"], {}, ValueError, "without repetition"),
        (LAYERS, {"pairs": "some"}, ValueError, r"a list of \(shallow, deep\) names, got 'some'"),
        (LAYERS, {"pairs": []}, ValueError, "at least one pair"),
        (LAYERS, {"pairs": 3}, TypeError, r"a str or a list of \(shallow, deep\) names, got int"),
        (LAYERS, {"pairs": ["layer1"]}, TypeError, "names, got 'layer1'"),
        (LAYERS, {"pairs": [("layer1", "fc")]}, ValueError, "names from layers"),
        (
            LAYERS,
            {"pairs": [("layer1", "layer2")] * 2},
            ValueError,
            r"without repetition, got \('layer1', 'layer2'\) twice",
        ),
        (LAYERS, {"pairs": [("layer3", "layer1")]}, ValueError, "in the order of layers"),
        (LAYERS, {"weight": -1.0}, ValueError, "weight >= 0, got -1.0"),
        (LAYERS, {"weight": "1"}, TypeError, "weight to be a number, got str"),
        (LAYERS, {"warmup_steps": -1}, ValueError, "warmup_steps >= 0, got -1"),
        (LAYERS, {"warmup_steps": 2**63}, ValueError, "warmup_steps < 2"),
        (LAYERS, {"warmup_steps": 1.5}, TypeError, "warmup_steps to be an int, got float"),
        (LAYERS, {"channel_mode": "all"}, ValueError, "got 'all'"),
        (LAYERS, {"weighting": "deepemd"}, ValueError, 'weighting "uniform" or "cross-reference", got .deepemd.'),
        (LAYERS, {"weighting": "cross-reference", "patch_size": 2}, ValueError, "patch_size 1 .* got 2"),
        (
            {"layer1": layouts.tokens, "layer2": None},
            {},
            TypeError,
            r"layers to map 'layer1' to a function or None, got the class tokens; write layouts.tokens\(\)",
        ),
        ({"layer1": layouts.item, "layer2": None}, {}, TypeError, r"write layouts.item\(key\)"),
        ({"layer1": nn.Flatten, "layer2": None}, {}, TypeError, r"got the class Flatten; write Flatten\(\)"),
        (LAYERS, {"epsilon": 0.1}, TypeError, "options among .*eps.*, got 'epsilon'"),
        (LAYERS, {"reduction": "sum"}, TypeError, "got 'reduction'"),
    ],
)
def test_bad_arguments(net, layers, options, error, message):
    with pytest.raises(error, match=message):
        SelfFeatureRegularizer(net, layers, **options)


def test_model_must_be_a_module():
    with pytest.raises(TypeError, match="nn.Module, got function"):
        SelfFeatureRegularizer(lambda x: x, LAYERS)


@pytest.mark.parametrize(
    "option, why",
    [
        ("teacher_self", "the deep maps are others in every step"),
        ("student_weight", "one weight cannot fit maps of several sizes"),
        ("teacher_weight", "one weight cannot fit maps of several sizes"),
        ("reduction", "the loss is a mean by definition"),
    ],
)
def test_options_of_the_emd_that_maps_do_not_have(option, why):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3))
    with pytest.raises(TypeError, match=f"SelfFeatureRegularizer: expected options .*, got '{option}': {why}"):
        SelfFeatureRegularizer(model, ["0", "1"], **{option: 3})


@pytest.mark.parametrize(
    "option, value, kind, said",
    [
        ("solver", "exakt", ValueError, "expected solver to be one of"),
        ("metric", "l3", ValueError, "expected metric to be one of"),
        ("objective", "entropy", ValueError, "expected objective to be one of"),
        ("eps", -1, ValueError, "expected eps to be finite and above 0"),
        ("eps_scale", "mean", ValueError, "expected eps_scale to be one of"),
        ("tol", -1e-3, ValueError, "expected tol to be finite and at least 0"),
        ("max_iter", 0, ValueError, "expected max_iter to be at least 1"),
        ("max_iter", "many", TypeError, "expected max_iter to be an int"),
        ("reach", 0, ValueError, "expected reach to be finite and above 0"),
        ("reach", (1, 2, 3), ValueError, "expected reach to be None, a number"),
        ("patch_size", 0, ValueError, "expected patch_size to be at least 1"),
    ],
)
def test_options_of_the_emd_are_looked_at_at_once(option, value, kind, said):
    def net():
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3))

    with pytest.raises(kind, match=f"sfr_ext.SelfFeatureRegularizer: {said}"):
        SelfFeatureRegularizer(net(), ["0", "1"], **{option: value})
    with pytest.raises(kind, match=f"sfr_ext.FeatureDistiller: {said}"):
        FeatureDistiller(net(), net(), {"0": "1"}, **{option: value})
    with pytest.raises(kind, match=f"sfr_ext.EMDL2Loss: {said}"):
        EMDL2Loss(**{option: value})
