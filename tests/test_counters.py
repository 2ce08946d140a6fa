"""Counters and tables that change in place: whatever runs the step, gradients are those of eager.

Each way to run a step is compared with plain eager steps, gradient by gradient, over several steps, since a counter
that backward reads too late is right in the first one only by chance.
"""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfr_ext import DynamicLabelSmoothing, SelfFeatureRegularizer

LAYERS = ["0", "2"]
STEPS = 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(1, 4, 3, 2, 1), nn.Tanh(), nn.Conv2d(4, 8, 3, 2, 1)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32, 3)).double()


class Training:
    """A network, both modules, and the loss that they are in."""

    def __init__(self, prior: str = "uniform", schedule: str = "linear", **options) -> None:
        self.net = network()
        self.sfr = SelfFeatureRegularizer(self.net, LAYERS, warmup_steps=10, solver="exact", **options)
        self.smooth = DynamicLabelSmoothing(0.5, 5, schedule, prior)
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(6, 1, 8, 8, dtype=torch.float64, generator=generator)
        self.labels = torch.randint(0, 3, (6,), generator=generator)

    def loss(self, images):
        return self.smooth(self.net(images), self.labels) + self.sfr.loss()

    def loss_and_step(self, images):
        loss = self.loss(images)
        self.smooth.step()
        return loss

    def gradients(self, loss):
        return torch.autograd.grad(loss, list(self.net.parameters()))


def eager(**options):
    """The gradients of each step, by the plainest loop; and what is in state_dict at the end."""
    training = Training(**options)
    steps = []
    for _ in range(STEPS):
        steps.append(training.gradients(training.loss(training.images)))
        training.smooth.step()
    assert not torch.allclose(steps[0][0], steps[-1][0])  # a counter that stood still would show nothing
    return steps, state(training)


def state(training):
    return {**training.sfr.state_dict(), **{f"smooth.{k}": v for k, v in training.smooth.state_dict().items()}}


def assert_like_eager(training, steps, **options):
    wanted, end = eager(**options)
    for ours, theirs in zip(steps, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(state(training), end)


PRIORS = pytest.mark.parametrize("prior", ["uniform", "online"])


# Eager


@PRIORS
def test_backward_after_step(prior):
    training = Training(prior)
    steps = [training.gradients(training.loss_and_step(training.images)) for _ in range(STEPS)]
    assert_like_eager(training, steps, prior=prior)


@PRIORS
def test_backward_after_all_steps(prior):
    training = Training(prior)
    losses = [training.loss_and_step(training.images) for _ in range(STEPS)]
    assert_like_eager(training, [training.gradients(loss) for loss in losses], prior=prior)


# torch.compile

EAGER, FULL = {"backend": "aot_eager", "fullgraph": True}, {"fullgraph": True}
REDUCED = {"mode": "reduce-overhead", "fullgraph": True}

# What is compiled: loss() and step(); or loss() alone, with a step before backward; or the network alone. All of them
# with aot_eager, which differentiates as inductor does and keeps more; some with inductor, which takes seconds each.
WAYS = {
    "both, aot_eager": ("both", "uniform", EAGER),
    "both, aot_eager, online": ("both", "online", EAGER),
    "loss, aot_eager": ("loss", "uniform", EAGER),
    "loss, aot_eager, online": ("loss", "online", EAGER),
    "network, aot_eager": ("network", "uniform", EAGER),
    "both, default": ("both", "uniform", {}),
    "both, fullgraph, online": ("both", "online", FULL),
    "loss, reduce-overhead": ("loss", "uniform", REDUCED),
}


@pytest.fixture
def compiler():
    """Inductor's own C++ compiler: CXX may hold a wrapper with arguments, which it does not take."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ for inductor")
    import torch._inductor.config as config

    with config.patch({"cpp.cxx": (None, "g++")}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    "way",
    [way if options is EAGER else pytest.param(way, marks=pytest.mark.slow) for way, (*_, options) in WAYS.items()],
)
def test_compiled(compiler, way):
    inside, prior, options = WAYS[way]
    training = Training(prior)
    net = torch.compile(training.net, **options)
    runs = {
        "both": torch.compile(training.loss_and_step, **options),
        "loss": torch.compile(training.loss, **options),
        "network": lambda images: training.smooth(net(images), training.labels) + training.sfr.loss(),
    }
    steps, graphs = [], []
    for _ in range(STEPS):
        loss = runs[inside](training.images)
        if inside != "both":
            training.smooth.step()  # before backward
        steps.append(training.gradients(loss))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert_like_eager(training, steps, prior=prior)
    assert graphs[1] == graphs[-1], "compiled anew for a later step"


@pytest.mark.parametrize("schedule", ["cosine", torch.square])
def test_compiled_schedules(compiler, schedule):
    training = Training(schedule=schedule)
    run = torch.compile(training.loss_and_step, fullgraph=True, backend="aot_eager")
    steps = [training.gradients(run(training.images)) for _ in range(STEPS)]
    assert_like_eager(training, steps, schedule=schedule)


def test_a_compiled_evaluation_counts_nothing(compiler):
    training = Training("online")
    training.net.eval()
    training.smooth.eval()
    run = torch.compile(training.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(training.images), training.loss(training.images))
    assert training.sfr.steps == 0 and training.smooth.steps == 0


# torch.func


def functional(training):
    names, values = zip(*training.net.named_parameters(), strict=True)

    def loss(parameters, images):
        logits = torch.func.functional_call(training.net, dict(zip(names, parameters, strict=True)), (images,))
        return training.smooth(logits, training.labels) + training.sfr.loss()

    return loss, tuple(value.detach() for value in values)


@PRIORS
def test_func_grad(prior):
    training = Training(prior)
    loss, parameters = functional(training)
    steps = []
    for _ in range(STEPS):
        steps.append(torch.func.grad(loss)(parameters, training.images))
        training.smooth.step()
    assert_like_eager(training, steps, prior=prior)


@PRIORS
def test_func_grad_with_the_step_inside(prior):
    training = Training(prior)
    loss, parameters = functional(training)

    def loss_and_step(parameters, images):
        value = loss(parameters, images)
        training.smooth.step()
        return value

    steps = [torch.func.grad_and_value(loss_and_step)(parameters, training.images)[0] for _ in range(STEPS)]
    assert_like_eager(training, steps, prior=prior)


def test_func_jacrev():
    training = Training()
    loss, parameters = functional(training)
    steps = []
    for _ in range(STEPS):
        steps.append(torch.func.jacrev(loss)(parameters, training.images))
        training.smooth.step()
    assert_like_eager(training, steps)


def test_func_vmap_of_grad_counts_one_step():
    training = Training()
    loss, parameters = functional(training)
    images = torch.stack([training.images, 2 * training.images])
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    assert training.sfr.steps == 1
    for i in range(2):
        alone = Training()
        torch.testing.assert_close([x[i] for x in each], list(alone.gradients(alone.loss(images[i]))))


def test_an_online_prior_does_not_learn_under_vmap():
    smooth = DynamicLabelSmoothing(0.1, schedule="constant", prior="online")
    logits, target = torch.randn(2, 5, 3), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(RuntimeError, match="under torch.func.vmap put it into evaluation mode"):
        torch.func.vmap(smooth, (0, None))(logits, target)
    smooth.eval()
    torch.func.vmap(smooth, (0, None))(logits, target)


def test_state_is_plain_after_a_transform():
    training = Training("online")
    loss, parameters = functional(training)
    torch.func.grad(loss)(parameters, training.images)
    for tensor in (*state(training).values(), *training.sfr.values().values()):
        assert not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        tensor.numpy()
    assert training.sfr.steps == 1


def test_counters_handed_over_by_functional_call():
    smooth = DynamicLabelSmoothing(0.4, 4)
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    given = {"steps": torch.tensor(2)}
    ours = torch.func.grad(lambda z: torch.func.functional_call(smooth, given, (z, target)))(logits)
    logits.requires_grad_()
    (theirs,) = torch.autograd.grad(F.cross_entropy(logits, target, label_smoothing=0.2), logits)
    torch.testing.assert_close(ours, theirs)


# Accumulation over several losses of one graph


def test_two_losses_of_different_steps_in_one_backward():
    training = Training()
    first, second = training.loss_and_step(training.images), training.loss_and_step(training.images)
    wanted, _ = eager()
    torch.testing.assert_close(
        training.gradients(first + second), tuple(a + b for a, b in zip(wanted[0], wanted[1], strict=True))
    )
