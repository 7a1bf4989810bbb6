"""ActNorm is initialised from the first training batch only, and remembers that it is initialised.

After the first forward in training every channel has mean 0 and standard deviation 1: in a single layer, in a flow step
and in the coupling networks of a whole model. The flag survives state dicts, copies, pickle and a new process.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from test_nn import assert_close, moved, ready
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import glow_kernels as gk
from glow_kernels.nn import ActNorm, AffineCoupling, FlowStep
from glow_kernels.nn.network import HiddenConv2d

NOT_INITIALISED = (
    "^ActNorm of 4 channels is not initialised: run one forward in training mode, "
    r"or model\.initialize\(batch\), or load weights, before evaluating, inverting, sampling or exporting$"
)


def skewed(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random data whose channels have different means and standard deviations."""
    channel = torch.arange(1, shape[1] + 1, dtype=dtype).view(-1, *(1,) * (len(shape) - 2))
    return 3.0 * channel + channel * torch.randn(shape, dtype=dtype)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation (C,)."""
    values = x.transpose(0, 1).flatten(1)
    return values.mean(1), values.std(1, correction=0)


def assert_normalised(z: Tensor, std: Tensor, eps: float = 1e-6) -> None:
    """Check mean 0, and standard deviation 1 up to ``eps``, which is added to the deviation of the data, ``std``."""
    mean, actual = statistics(z)
    assert_close(mean, torch.zeros_like(mean), 1e-12)
    assert_close(actual, std / (std + eps), 1e-12)


def through_state_dict(module: nn.Module) -> nn.Module:
    """A new module of the same kind that has loaded the saved state of ``module``."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = ActNorm(4) if isinstance(module, ActNorm) else FlowStep(4, 8)
    fresh.double().load_state_dict(torch.load(file, weights_only=True))
    return fresh


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "state_dict": through_state_dict,
}


@pytest.mark.parametrize("shape", [(64, 4), (16, 4, 5), (8, 4, 3, 5), (4, 4, 2, 3, 2)], ids=str)
def test_first_training_forward_normalises_every_channel(backend, shape):
    x = skewed(*shape)
    layer = ActNorm(4).double()
    z, log_det = layer(x)
    mean, std = statistics(x)
    assert_normalised(z, std)
    assert_close(layer.bias.detach(), -mean, 1e-12)
    positions = x[0, 0].numel()
    assert_close(log_det.detach(), (-positions * (std + 1e-6).log().sum()).expand(shape[0]), 1e-10)


def test_eps_is_added_to_the_standard_deviation():
    x = skewed(8, 4, 3, 5)
    z, _ = ActNorm(4, eps=0.5).double()(x)
    assert_normalised(z, statistics(x)[1], eps=0.5)


def test_only_the_first_training_forward_initialises():
    layer = ActNorm(4)
    layer(skewed(8, 4, 3, 3, dtype=torch.float32))
    before = copy.deepcopy(layer.state_dict())
    for mode in (True, False):
        layer.train(mode)(torch.randn(8, 4, 3, 3))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_initialize_starts_again():
    layer = ActNorm(4).double()
    x = skewed(8, 4, 3, 5)
    layer(torch.randn_like(x))
    layer.eval().initialize(x)
    assert_normalised(layer(x)[0], statistics(x)[1])


def test_a_constant_channel_stays_finite():
    x = torch.randn(8, 4, 3, 3)
    x[:, 2] = 7.0
    layer = ActNorm(4)
    z, log_det = layer(x)
    assert z.isfinite().all()
    assert log_det.isfinite().all()
    # The mean of sevens is exact in float32, so the channel becomes exactly zero.
    assert torch.equal(z[:, 2], torch.zeros(8, 3, 3))
    assert_close(layer.log_scale[2].detach(), -torch.tensor(1e-6).log(), 1e-5)
    assert_close(layer.inverse(z)[0], x, 1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [lambda: ActNorm(4), lambda: FlowStep(4, 8)], ids=["ActNorm", "FlowStep"])
def test_before_initialisation_inverse_and_evaluation_are_refused(make, training):
    layer = make().train(training)
    calls = [layer.inverse] if training else [layer.inverse, layer]
    for call in calls:
        with pytest.raises(RuntimeError, match=NOT_INITIALISED):
            call(torch.randn(2, 4, 3, 3))


def test_before_initialisation_a_coupling_refuses_evaluation():
    coupling = AffineCoupling(4, 4).eval()
    for call in (coupling, coupling.inverse):
        with pytest.raises(RuntimeError, match=NOT_INITIALISED):
            call(torch.randn(2, 4, 3, 3))


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("make", [lambda: ActNorm(4), lambda: FlowStep(4, 8)], ids=["ActNorm", "FlowStep"])
def test_a_copy_knows_whether_it_is_initialised(make, duplicate):
    fresh = duplicate(make().double()).eval()
    x = skewed(8, 4, 3, 3)
    with pytest.raises(RuntimeError, match="not initialised"):
        fresh(x)
    layer = ready(make(), x)
    same = duplicate(layer).eval()
    assert all(torch.equal(one, other) for one, other in zip(same(x), layer(x), strict=True))
    same.train()(torch.randn_like(x))
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in same.state_dict().items())


def test_loading_an_uninitialised_state_makes_uninitialised():
    layer = ActNorm(4)
    layer(torch.randn(8, 4, 3, 3))
    layer.load_state_dict(ActNorm(4).state_dict())
    with pytest.raises(RuntimeError, match="not initialised"):
        layer.inverse(torch.randn(8, 4, 3, 3))


def test_what_cannot_be_loaded_is_said_and_the_memory_stays():
    layer = ActNorm(4)
    layer(torch.randn(8, 4, 3, 3))
    with pytest.raises(RuntimeError, match=r"size mismatch for initialized.* torch\.Size\(\[4\]\)"):
        layer.load_state_dict({**layer.state_dict(), "initialized": torch.zeros(4, dtype=torch.bool)})
    layer.inverse(torch.randn(8, 4, 3, 3))


def test_a_state_without_values_is_loaded_as_that_of_any_module():
    model = gk.models.Glow(1, 4, steps=1, levels=1, hidden_channels=4).to("meta")
    model.load_state_dict(model.state_dict())
    model.load_state_dict(model.state_dict(), assign=True)


def test_every_actnorm_of_a_model_is_normalised_by_the_first_forward():
    model = gk.models.Glow(3, 8, steps=2, levels=2, hidden_channels=8, mixing="plain").double()
    networks, steps = [], []

    def check_network(convolution, inputs, output):
        x, padding = inputs[0], convolution.padding
        convolved = nn.functional.conv2d(x, convolution.weight, padding=padding)
        normalised = nn.functional.conv2d(x, *convolution.folded(x), padding=padding)
        assert_normalised(normalised, statistics(convolved)[1])
        assert torch.equal(output, normalised.relu())
        networks.append(convolution)

    def keep_input(step, inputs):
        steps.append((step, inputs[0]))

    for module in model.modules():
        if isinstance(module, HiddenConv2d):
            module.register_forward_hook(check_network)
        if isinstance(module, FlowStep):
            module.register_forward_pre_hook(keep_input)
    model(skewed(16, 3, 8, 8))
    assert len(networks) == 8
    assert len(steps) == 4
    for step, x in steps:
        assert_normalised(step.actnorm(x)[0], statistics(x)[1])


def test_initialize_of_a_model_is_the_first_training_forward():
    model = gk.models.Glow(3, 8, steps=2, levels=2, hidden_channels=8)
    other = copy.deepcopy(model)
    x = torch.randn(8, 3, 8, 8)
    model.eval().levels[0].train()
    modes = [module.training for module in model.modules()]
    model.initialize(x)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    other.train()(x)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    model.initialize(torch.randn_like(x))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


IN_A_NEW_PROCESS = """
import sys, torch, glow_kernels as gk
folder, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
x = torch.load(folder + "/x")
loaded = gk.models.Glow(3, 8, steps=2, levels=2, hidden_channels=8, mixing="shuffle")
loaded.load_state_dict(torch.load(folder + "/state_dict"))
results = []
for model in (loaded.eval(), torch.load(folder + "/pickle", weights_only=False)):
    latents = model.encode(x)
    results.append([model.log_prob(x), *latents, model.decode(latents)])
    model.train()(torch.randn_like(x))
    results[-1] += model.state_dict().values()
torch.save(results, folder + "/results")
"""


def test_a_new_process_continues_bit_for_bit(tmp_path):
    model = gk.models.Glow(3, 8, steps=2, levels=2, hidden_channels=8, mixing="shuffle")
    x = torch.randn(8, 3, 8, 8)
    model.initialize(x)
    moved(model, 0.02).eval()
    for name, thing in {"x": x, "state_dict": model.state_dict(), "pickle": model}.items():
        torch.save(thing, tmp_path / name)
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(tmp_path), str(torch.get_num_threads())]
    subprocess.run(command, check=True, timeout=120)
    latents = model.encode(x)
    expected = [model.log_prob(x), *latents, model.decode(latents), *model.state_dict().values()]
    for results in torch.load(tmp_path / "results"):
        assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("use_buffers", [True, False], ids=["buffers averaged", "buffers copied"])
def test_an_average_that_is_made_before_the_first_batch_keeps_its_parameters(use_buffers, training):
    model = gk.models.Glow(1, 4, 2, 1, 4)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=use_buffers)
    model.initialize(skewed(4, 1, 4, 4, dtype=torch.float32))
    average.update_parameters(model)
    average.train(training)
    x = 5.0 * skewed(3, 1, 4, 4, dtype=torch.float32)
    torch.testing.assert_close(average(x), model(x))
    for expected, parameter in zip(model.parameters(), average.parameters(), strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("memory", ["store", "anchor"])
def test_functional_call_does_not_overwrite_the_parameters_that_it_is_given(memory):
    model = gk.models.Glow(1, 4, 2, 1, 4)
    model.initialize(skewed(4, 1, 4, 4, dtype=torch.float32))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        skeleton = gk.models.Glow(1, 4, 2, 1, 4, memory=memory)
    x = 5.0 * skewed(3, 1, 4, 4, dtype=torch.float32)
    torch.testing.assert_close(torch.func.functional_call(skeleton, state, (x,)), model(x))
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_initialises_nothing(value):
    layer = ActNorm(4).double()
    x = skewed(4, 4, 3)
    bad = x.clone()
    bad[1, 2] = value
    message = "^x must be finite to initialise ActNorm, got a standard deviation that is not finite in 1 of 4 channels$"
    with pytest.raises(ValueError, match=message):
        layer(bad)
    assert not layer.initialized
    z, _ = layer(x)
    assert_normalised(z, statistics(x)[1])


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_what_is_not_initialised_is_not_exported(strict):
    # The exported program would initialise again from every batch that it gets.
    x = torch.randn(3, 4, 2, 2)
    with pytest.raises(RuntimeError, match=r"ActNorm of 4 channels is not initialised: run one forward"):
        torch.export.export(ActNorm(4), (x,), strict=strict)
    layer = ActNorm(4)
    layer.initialize(x)
    exported = torch.export.export(layer, (x,), strict=strict).module()
    torch.testing.assert_close(exported(2.0 * x), layer(2.0 * x))


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("memory", ["store", "anchor"])
@pytest.mark.parametrize("per_step", [False, True])
def test_nothing_is_written_to_weights_that_fsdp_gives_up(memory: str, per_step: bool, process_group: None) -> None:
    """They would return to their old values, but count as initialised."""
    x, mesh = torch.randn(4, 1, 4, 4), dist.device_mesh.init_device_mesh("cpu", (1,))
    model = gk.models.Glow(1, 4, steps=2, levels=1, hidden_channels=4, memory=memory)
    initialized = copy.deepcopy(model)
    initialized.initialize(x)
    expected = initialized(x)
    for one in (model, initialized):
        for step in one.levels[0].steps if per_step else ():
            fully_shard(step, mesh=mesh)
        fully_shard(one, mesh=mesh)
    message = r"^ActNorm of 4 .* call model\.initialize\(batch\), or load weights, before it is wrapped or sharded$"
    with pytest.raises(RuntimeError, match=message):
        model(x)
    assert not any(module.is_initialized() for module in model.modules() if isinstance(module, ActNorm))
    initialized(x).sum().backward()
    assert_close(initialized(x), expected, 1e-6)


@pytest.mark.filterwarnings("ignore:FSDP")
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_is_written_to_weights_of_the_older_fsdp(
    use_orig_params: bool, grad: bool, process_group: None
) -> None:
    model = gk.models.Glow(1, 4, steps=1, levels=1, hidden_channels=4)
    sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"^ActNorm of 4 channels .* or sharded$"):
        sharded(torch.randn(4, 1, 4, 4))


@pytest.mark.filterwarnings("ignore:FSDP")
@pytest.mark.parametrize("memory", ["checkpoint", "anchor"])
def test_steps_under_the_older_fsdp_are_refused_by_chains(memory: str, process_group: None) -> None:
    """An inverse would read weights that are not gathered, which crashed the process."""
    model, x = gk.models.Glow(1, 4, steps=1, levels=1, hidden_channels=4, memory=memory), torch.randn(4, 1, 4, 4)
    model.initialize(x)
    steps = model.levels[0].steps
    steps[0] = FullyShardedDataParallel(steps[0], device_id=torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"^step 0 .*: its weights are freed before .* fully_shard, or wrap only"):
        model(x)


def test_networks_under_fsdp_are_refused_by_chains(process_group: None) -> None:
    """Backward found tensors that are not parameters of the step."""
    model, x = gk.models.Glow(1, 4, steps=1, levels=1, hidden_channels=4, memory="anchor"), torch.randn(4, 1, 4, 4)
    model.initialize(x)
    fully_shard(model.levels[0].steps[0].coupling.network, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(RuntimeError, match=r"^step 0 .*: FSDP shards a part of it, .*: use fully_shard on the step$"):
        model(x)


def test_nothing_is_written_to_weights_that_fsdp_gives_up_when_compiled(process_group: None) -> None:
    model = gk.models.Glow(1, 4, steps=1, levels=1, hidden_channels=4)
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    model.compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"^ActNorm of 4 channels .* or sharded$"):
        model(torch.randn(4, 1, 4, 4))
