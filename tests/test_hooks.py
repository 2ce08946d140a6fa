"""What reaches the regulariser's hooks, and what it says when the forward was not the one that it needs."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sfr_ext import DynamicLabelSmoothing, FeatureDistiller, SelfFeatureRegularizer, layouts

LAYERS = ["layer1", "layer2", "layer3"]


class Net(nn.Module):
    """Three stages; ``how`` runs a stage."""

    def __init__(self, how=lambda stage, x: stage(x)):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        for i, (fan_in, fan_out, stride) in enumerate([(1, 4, 1), (4, 8, 2), (8, 16, 2)], 1):
            stage = nn.Sequential(nn.Conv2d(fan_in, fan_out, 3, stride, 1), nn.BatchNorm2d(fan_out), nn.ReLU())
            self.add_module(f"layer{i}", stage)

    def forward(self, x):
        for name in LAYERS:
            x = self.how(getattr(self, name), x)
        return x.mean((1, 2, 3))


@pytest.fixture
def images():
    return torch.rand(3, 1, 8, 8)


def gradients(net, loss):
    return torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)


def plain(images):
    net = Net()
    sfr = SelfFeatureRegularizer(net, LAYERS)
    return gradients(net, net(images).sum() + sfr.loss())


# No gradient to give


@pytest.mark.parametrize("run", [lambda net, x: net(x), lambda net, x: checkpoint(net, x, use_reentrant=True)])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_later_forward_without_gradient(images, run, context):
    net = Net()
    sfr = SelfFeatureRegularizer(net, LAYERS, warmup_steps=5)
    net(images)
    with context():
        run(net, images)
    with pytest.raises(RuntimeError, match=r"none of the maps of 'layer1', 'layer2' requires one.*no_grad"):
        sfr.loss()
    assert sfr.steps == 0
    net(images)
    assert sfr.loss().requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_loss_within_a_checkpoint(images, reentrant):
    net = Net()
    sfr = SelfFeatureRegularizer(net, LAYERS)
    loss = checkpoint(lambda x: net(x).sum() + sfr.loss(), images.requires_grad_(), use_reentrant=reentrant)
    net(images)  # whose features are not to be taken for those of the checkpoint
    with pytest.raises(RuntimeError, match=r"called in backward.*call loss\(\) outside"):
        loss.backward()


def test_reentrant_checkpoint(images):
    net = Net(lambda stage, x: checkpoint(stage, x, use_reentrant=True))
    sfr = SelfFeatureRegularizer(net, LAYERS)
    net(images)
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        sfr.loss()


@pytest.mark.parametrize("pairs", ["all", [("layer1", "layer3"), ("layer2", "layer3")]])
def test_reentrant_checkpoint_of_a_part(images, pairs):
    """Its first maps have a gradient, those within it have none: a part of the loss would teach nothing."""
    net = Net()
    sfr = SelfFeatureRegularizer(net, LAYERS, pairs=pairs)
    net.forward = lambda x: checkpoint(lambda y: net.layer3(net.layer2(y)), net.layer1(x), use_reentrant=True)
    net(images)
    with pytest.raises(RuntimeError, match=r"map of 'layer2' requires none, and one before it does.*use_reentrant"):
        sfr.loss()
    net(images)
    with torch.no_grad():
        assert sfr.loss() > 0
    only = SelfFeatureRegularizer(net, LAYERS, pairs=[("layer1", "layer3")])
    net(images)
    assert only.loss().requires_grad


def test_distiller_of_a_part_that_is_cut_off(images):
    net, teacher = Net(), Net()
    distiller = FeatureDistiller(net, teacher, {name: name for name in LAYERS})
    net.forward = lambda x: net.layer3(net.layer2(net.layer1(x)).detach())
    net.layer3.requires_grad_(False)
    net(images), teacher(images)
    with pytest.raises(RuntimeError, match="map of 'layer3' requires none, and one before it does"):
        distiller.loss()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_evaluation_after_the_training_pass(images, context, compiled):
    net = Net()
    sfr = SelfFeatureRegularizer(net, LAYERS, warmup_steps=5)
    called = torch.compile(net, backend="eager") if compiled else net

    def evaluated():
        net.eval()
        with context():
            called(images), called(images)
        net.train()

    called(images)
    evaluated()
    with pytest.raises(RuntimeError, match="one in evaluation mode has followed it.*call loss.. before it"):
        sfr.loss()
    assert sfr.steps == 0
    called(images)
    evaluated()
    with torch.no_grad():
        sfr.loss()  # the value alone
    called(images)
    sfr.loss().backward()
    evaluated()
    sfr.loss()  # of a validation that took nothing's place
    called(images)
    evaluated()
    called(images)  # the last one counts, and it is one to train by
    assert sfr.loss().requires_grad and sfr.steps == 2


class Holder(nn.Module):
    """What holds the network and is not called itself: a LightningModule, a dict of networks."""

    def __init__(self, net):
        super().__init__()
        self.parts = nn.ModuleDict({"net": net})


def held(net):
    """A regulariser that hangs on a module around the network."""
    return SelfFeatureRegularizer(Holder(net), [f"parts.net.{name}" for name in LAYERS], warmup_steps=5)


def stages(net):
    """The network without a call of its own: what hangs on it sees its layers alone."""
    return lambda x: net.forward(x)


@pytest.mark.parametrize(
    "call",
    [lambda net: net, stages, lambda net: torch.compile(net, backend="eager", fullgraph=True)],
    ids=["the network", "its layers", "compiled"],
)
def test_an_evaluation_where_the_owner_is_not_called(images, call):
    net = Net()
    sfr, called = held(net), call(net)
    called(images)
    sfr.loss().backward()
    assert sfr.steps == 1
    for context in (torch.no_grad, torch.enable_grad):
        called(images)
        net.eval()
        with context():
            called(images), called(images)
        net.train()
        with pytest.raises(RuntimeError, match="one in evaluation mode has followed it.*call loss.. before it"):
            sfr.loss()
    with torch.no_grad():
        net.eval()(images)
    sfr.loss()  # of a validation that took nothing's place
    called(images)
    net.eval()(images)
    called_before = net.train()(images)
    ours = gradients(net, called_before.sum() + sfr.loss())
    assert all(x is not None for x in ours) and sfr.steps == 2
    called(images)
    with torch.no_grad():
        called(images)
    with pytest.raises(RuntimeError, match=r"none of the maps .* requires one.*no_grad"):
        sfr.loss()


@pytest.mark.parametrize("frozen", [["layer3"], ["layer1"], LAYERS])
def test_frozen_stages_where_the_owner_is_not_called(images, frozen):
    net = Net()
    sfr = held(net)
    for name in frozen:
        getattr(net, name).eval()
    for n in (1, 2):
        net(images)
        sfr.loss()
        assert sfr.steps == n
    net.eval()
    net(images)
    sfr.loss()
    assert sfr.steps == 2


@pytest.mark.parametrize("call", [lambda net: net, stages], ids=["the network", "its layers"])
def test_a_skipped_layer_where_the_owner_is_not_called(images, call):
    """The map of an earlier forward is not taken for that of the last one."""
    net = Net()
    sfr, called = held(net), call(net)
    called(images)
    net.how = lambda stage, x: x.mean(1, keepdim=True).repeat(1, 8, 1, 1) if stage is net.layer2 else stage(x)
    called(images)
    with pytest.raises(RuntimeError, match=r"'parts.net.layer2'"):
        sfr.loss()
    called(images)
    with pytest.raises(RuntimeError, match="but not through 'parts.net.layer2': a condition"):
        sfr.loss()


@pytest.mark.parametrize("call", [lambda net: net, stages], ids=["the network", "its layers"])
def test_a_layer_that_runs_twice_in_one_forward(images, call):
    net = Net(lambda stage, x: stage(x) if stage[0].in_channels == 1 else stage(x) + stage(x))
    sfr = held(net)
    whole = SelfFeatureRegularizer(net, LAYERS)
    call(net)(images)
    torch.testing.assert_close(sfr.loss() * 5, whole.loss())


def test_an_owner_that_runs_its_network_stage_by_stage(images):
    """A part that holds all layers, and is called once for each: no call begins a forward within the owner's."""

    class ByStage(Net):
        def forward(self, x, i):
            return self.how(getattr(self, LAYERS[i]), x)

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = ByStage()

        def forward(self, x):
            for i in range(3):
                x = self.net(x, i)
            return x.mean((1, 2, 3))

    owner = Owner()
    sfr = SelfFeatureRegularizer(owner, [f"net.{name}" for name in LAYERS])
    ours = gradients(owner, owner(images).sum() + sfr.loss())
    torch.testing.assert_close(ours, plain(images))


def test_projections_where_the_owner_is_not_called(images):
    net = Net()
    layers = [f"parts.net.{name}" for name in LAYERS]
    sfr = SelfFeatureRegularizer(Holder(net), layers, channel_mode="project")
    net(images)
    assert len(list(sfr.parameters())) == 3
    sfr.loss().backward()


class Own(nn.Module):
    """Owns the network and what it is trained with."""

    def __init__(self, make):
        super().__init__()
        self.net = Net(nn.Module.__call__)  # which can be pickled
        self.reg = make(self.net)


OWNED = {
    "regulariser": lambda net: SelfFeatureRegularizer(net, LAYERS, channel_mode="project"),
    "attached": lambda net: SelfFeatureRegularizer(net, LAYERS, channel_mode="project", attach=True),
    "distiller": lambda net: FeatureDistiller(net, net, {"layer1": "layer3"}, channel_mode="project"),
}


@pytest.mark.parametrize("copied", [copy.copy, lambda sfr: sfr._replicate_for_data_parallel()])
def test_hooks_outlive_a_shallow_copy(images, copied):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))
    sfr = SelfFeatureRegularizer(net, ["0", "1"])
    net(images)
    wanted = sfr.loss().detach()
    other = copied(sfr)
    del other
    gc.collect()
    net(images)
    torch.testing.assert_close(sfr.loss().detach(), wanted)
    del sfr
    gc.collect()
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda owner: pickle.loads(pickle.dumps(owner))])
@pytest.mark.parametrize("make", OWNED.values(), ids=OWNED)
def test_a_copy_of_an_owner_makes_projections(images, make, copied):
    """Copied before the first call: a template of which each fold has its own."""
    template = Own(make)
    owners = [copied(template), copied(copied(template)), template]
    for owner in owners:
        owner.net(images)
        assert owner.reg.projections.made
        owner.net(images)
        owner.reg.loss().backward()
    for owner in owners[:2]:
        for name, weight in owner.reg.projections.named_parameters():
            assert not torch.equal(weight, getattr(template.reg.projections, name)), name
    template.reg.remove()
    owners[0].net(images)  # which still has hooks of its own
    owners[0].reg.loss()


@pytest.mark.parametrize("what", ["model", "regulariser"])
def test_a_copy_of_one_alone_makes_no_projections(images, what):
    net = Net()
    sfr = SelfFeatureRegularizer(net, LAYERS, channel_mode="project")
    if what == "model":
        copy.deepcopy(net)(images)
    else:
        other = copy.deepcopy(sfr)
        net(images)
        assert not other.projections.made and sfr.projections.made
        return
    assert not sfr.projections.made


def test_frozen_up_to_the_last_student(images):
    net = Net()
    net.layer1.requires_grad_(False)
    sfr = SelfFeatureRegularizer(net, LAYERS)
    net(images)
    assert sfr.loss().requires_grad  # layer2 is taught
    net.layer2.requires_grad_(False)
    net(images)
    with pytest.raises(RuntimeError, match="frozen"):
        sfr.loss()


def test_without_gradients_or_training_there_is_nothing_to_say(images):
    net = Net()
    sfr = SelfFeatureRegularizer(net, LAYERS)
    with torch.no_grad():
        net(images)
        sfr.loss()
    net.eval()
    with torch.no_grad():
        net(images)
    sfr.loss()


# Checkpoints that are not reentrant


def test_a_checkpoint_gives_the_same_gradients_and_is_not_a_forward(images):
    net = Net(lambda stage, x: checkpoint(stage, x, use_reentrant=False))
    sfr = SelfFeatureRegularizer(net, LAYERS)
    loss = net(images).sum() + sfr.loss()
    torch.testing.assert_close(gradients(net, loss), plain(images))
    with pytest.raises(
        RuntimeError, match=r"call model\(images\) before each loss\(\)"
    ):  # the layers ran again in backward
        sfr.loss()


# Training or not


@pytest.mark.parametrize("frozen", [["layer3"], ["layer1"], LAYERS])
def test_frozen_stages_do_not_stop_the_ramp(images, frozen):
    net = Net()
    sfr = SelfFeatureRegularizer(net, LAYERS, warmup_steps=4)
    for name in frozen:
        getattr(net, name).eval()
    for n in (1, 2):
        net(images)
        sfr.loss()
        assert sfr.current_weight == n / 4
    net.eval()
    net(images)
    sfr.loss()
    assert sfr.steps == 2


# Copies


def test_replicas_of_data_parallel_are_refused(images):
    net = Net()
    sfr = SelfFeatureRegularizer(net, LAYERS)
    replica = net._replicate_for_data_parallel()
    for name in LAYERS:
        stage = getattr(net, name)._replicate_for_data_parallel()
        stage._parameters, replica._modules[name] = {}, stage
    replica(images)
    with pytest.raises(RuntimeError, match=r"nn.DataParallel.*DistributedDataParallel"):
        sfr.loss()
    net(images)
    sfr.loss()


def test_data_parallel_on_one_device(images):
    net = Net()
    parallel = nn.DataParallel(net)
    sfr = SelfFeatureRegularizer(parallel, LAYERS)
    torch.testing.assert_close(gradients(net, parallel(images).sum() + sfr.loss()), plain(images))


# A layer that never ran


@pytest.mark.parametrize(
    "how",
    [
        lambda stage, x: checkpoint(lambda y: stage[2](stage[1](stage[0](y))), x, use_reentrant=False),
        lambda stage, x: stage.forward(x),
        lambda stage, x: stage(x) if stage[0].in_channels == 1 else stage.forward(x),
    ],
    ids=["checkpoint of children", "forward called", "conditional"],
)
def test_a_layer_that_never_ran_is_explained(images, how):
    net = Net(how)
    sfr = SelfFeatureRegularizer(net, LAYERS)
    net(images)
    ran = len(sfr._hooks[0].capture.features)
    with pytest.raises(RuntimeError) as caught:
        sfr.loss()
    said = str(caught.value)
    if ran:
        assert "passed through 'layer1', but not through 'layer2', 'layer3': a condition skips it" in said
        causes = ["checkpointing", "quantisation", "replaced"]
    else:
        start = (
            "call model(images) before each loss(): no forward has passed through 'layer1', 'layer2', 'layer3' since"
        )
        assert said.startswith(f"sfr_ext.SelfFeatureRegularizer.loss: {start}")
        causes = ["averaging", "jit", "torch.fx", "DataParallel", "skips", "checkpointing", "quantisation", "compile"]
    assert all(cause in said for cause in causes)
    assert len(said.split()) < 80


def test_a_traced_graph_and_a_copy_never_run_the_layers(images):
    net = Net()
    sfr = SelfFeatureRegularizer(net, LAYERS)
    for other in (torch.fx.symbolic_trace(net), copy.deepcopy(net)):
        other(images)
        with pytest.raises(RuntimeError, match=r"call model\(images\) before each loss\(\)"):
            sfr.loss()


@pytest.mark.parametrize("prefix", ["net", "net._orig_mod"])
def test_names_of_layers_of_a_part_that_is_compiled(images, prefix):
    owner = nn.Module()
    owner.net = torch.compile(Net(), backend="eager")
    with SelfFeatureRegularizer(owner, [f"{prefix}.{name}" for name in LAYERS]) as sfr:
        found = gradients(owner.net, owner.net(images).sum() + sfr.loss())
    torch.testing.assert_close(found, plain(images))
    assert not any("__prepare_scriptable__" in vars(module) for module in owner.modules())


def test_one_layer_by_two_names():
    owner = nn.Module()
    owner.net = torch.compile(Net(), backend="eager")
    with pytest.raises(ValueError, match=r"to name a module once, got 'net.layer1' and 'net._orig_mod.layer1' for one"):
        SelfFeatureRegularizer(owner, ["net.layer1", "net._orig_mod.layer1"])


def test_another_model_of_the_class_that_was_compiled_before(images):
    """Its graph, which has no hooks, is taken for this one's where torch.compile looks at no hooks (after 2.4)."""
    try:
        torch.compile(Net(), backend="eager")(images)
        net, ran = Net(), []
        net.get_submodule(LAYERS[0]).register_forward_hook(lambda *args: ran.append(1))
        sfr = SelfFeatureRegularizer(net, LAYERS)
        compiled = torch.compile(net, backend="eager")
        compiled(images)
        if not ran:
            with pytest.raises(RuntimeError, match=r"graph from before .* call torch.compiler.reset\(\) first"):
                sfr.loss()
            torch.compiler.reset()
            compiled(images)
        torch.testing.assert_close(gradients(net, compiled(images).sum() + sfr.loss()), plain(images))
    finally:
        torch.compiler.reset()


# torch.jit, torch.export


def check_live(net, sfr, images):
    """The hooks are where they were, and have caught nothing in between."""
    with pytest.raises(RuntimeError, match=r"call model\(images\) before each loss\(\)"):
        sfr.loss()
    wanted = SelfFeatureRegularizer(twin := Net(), LAYERS)
    ours = gradients(net, net(images).sum() + sfr.loss())
    torch.testing.assert_close(ours, gradients(twin, twin(images).sum() + wanted.loss()))


def scripted_net():
    return nn.Sequential(*(getattr(Net(), name) for name in LAYERS))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("which", ["model", "copy", "layer"])
def test_jit_script(images, which):
    net = scripted_net()
    own = []
    net[1].register_forward_pre_hook(lambda module, args: own.append(1))
    with SelfFeatureRegularizer(net, ["0", "2"]) as sfr:
        net[1]._forward_pre_hooks.popitem()  # a Python hook of the user's cannot be scripted either
        given = {"model": net, "copy": copy.deepcopy(net), "layer": net[0]}[which]
        scripted = torch.jit.script(given)
        ours = torch.autograd.grad(scripted(images).sum(), list(scripted.parameters()))
        theirs = torch.autograd.grad(given(images).sum(), list(given.parameters()))
        torch.testing.assert_close(ours, theirs)
        net(images)
        sfr.loss()
    assert not any("__prepare_scriptable__" in vars(module) for module in net.modules())


class Owner(nn.Module):
    """What people export: a module that holds the network and its losses."""

    def __init__(self, prior, mode, attach):
        super().__init__()
        self.net = scripted_net()
        self.smooth = DynamicLabelSmoothing(0.1, 10, prior=prior)
        self.sfr = SelfFeatureRegularizer(self.net, ["0", "1", "2"], channel_mode=mode, attach=attach)

    def forward(self, x):
        return self.net(x)

    def loss(self, x):
        return self.smooth(self(x).mean((2, 3)), torch.tensor([0, 1, 2])) + self.sfr.loss()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("prior", ["uniform", "online"])
@pytest.mark.parametrize("mode", ["match", "project"])
@pytest.mark.parametrize("attach", [False, True])
def test_jit_script_of_what_owns_the_losses(images, prior, mode, attach):
    """It can be scripted and saved; training goes on, though torch.jit puts what it was given into the owner."""
    owner = Owner(prior, mode, attach)
    owner(images)
    owner.loss(images).backward()
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(owner), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(images), owner(images))
    owner.sfr.loss()
    wanted = Owner(prior, mode, attach)
    wanted(images)
    wanted.loss(images).backward()
    with torch.no_grad():
        wanted(images), wanted(images)  # as many as above, for the running means
    for ours, theirs in zip(owner.parameters(), wanted.parameters(), strict=True):
        theirs.data.copy_(ours)
    ours, theirs = (torch.autograd.grad(each.loss(images), list(each.parameters())) for each in (owner, wanted))
    torch.testing.assert_close(ours, theirs)
    for twin in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        twin.loss(images)
    owner.sfr.remove()
    owner(images)
    with pytest.raises(RuntimeError, match="removed"):
        owner.sfr.loss()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_jit_trace(images):
    net = Net()
    sfr = SelfFeatureRegularizer(net, LAYERS)
    state = copy.deepcopy(net.state_dict())
    torch.jit.trace(net, images, check_trace=False)
    net.load_state_dict(state)
    check_live(net, sfr, images)


@pytest.mark.parametrize("strict", [False, True])
def test_export(images, strict):
    net = Net()
    sfr = SelfFeatureRegularizer(net, LAYERS)
    state = copy.deepcopy(net.state_dict())
    exported = torch.export.export(net, (images,), strict=strict).module()
    torch.testing.assert_close(exported(images), net(images))
    sfr.loss()
    net.load_state_dict(state)
    torch.export.export(net, (images,), strict=strict)
    check_live(net, sfr, images)


def test_pickle_after_remove_needs_nothing_of_ours(images):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3))
    SelfFeatureRegularizer(net, ["0", "1"]).remove()
    file = io.BytesIO()
    torch.save(net, file)
    assert b"sfr_ext" not in file.getvalue()


# Channels last


@pytest.mark.parametrize("shapes", [[(7, 7, 96), (7, 7, 96)], [(14, 14, 96), (7, 7, 192)]])
def test_channels_last_is_refused_by_name(shapes):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    outputs = [torch.rand(2, *shape, requires_grad=True) for shape in shapes]

    def run():
        for layer, output in zip(model, outputs, strict=True):
            layer(output)

    sfr = SelfFeatureRegularizer(model, ["0", "1"])
    run()
    with pytest.raises(ValueError, match=r"\[B, H, W, C\].*layouts.nhwc.*layouts.nchw"):
        sfr.loss()
    sfr = SelfFeatureRegularizer(model, {"0": layouts.nhwc, "1": layouts.nhwc})
    run()
    sfr.loss()
    if shapes[0][0] == shapes[1][0]:
        sfr = SelfFeatureRegularizer(model, {"0": layouts.nchw, "1": layouts.nchw})
        run()
        sfr.loss()


def test_square_maps_with_as_many_channels_are_not_taken_for_channels_last():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    sfr = SelfFeatureRegularizer(model, ["0", "1"])
    for layer in model:
        layer(torch.rand(2, 8, 8, 8, requires_grad=True))
    sfr.loss()
