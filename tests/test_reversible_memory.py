"""The memory that a chain keeps and its peak, counted with fake tensors at sizes for a GPU.

The published benchmark of memory is 256 x 256 images, batch 8, 256 hidden channels, 3 levels (InvertibleNetworks.jl,
JOSS 9(99), 2024, figure 2: 5.07 GB; normflows runs out of 40 GB at 64 steps per level). Gradients of parameters, which
every method needs, do not count: each is dropped as soon as it is computed.
"""

from __future__ import annotations

import copy
import itertools
import shutil

import pytest
import torch
from test_reversible import RECOMPUTING, Conditioned, Scaling, chain, flow_steps, recomputing, weighted
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import glow_kernels as gk
from glow_kernels import ReversibleSequential
from glow_kernels.bench import chains
from glow_kernels.bench.live_storages import LiveStorages, training_step_bytes
from glow_kernels.bench.memory import peak_extra_bytes
from glow_kernels.models import Glow
from glow_kernels.nn import FlowStep

GB = 1e9
BATCH, SIZE, HIDDEN = 8, 256, 256
# Bytes of the state of the first level, and of all three levels, each half as large as the one before.
FIRST_STATE = BATCH * 3 * SIZE * SIZE * 4
ALL_STATES = FIRST_STATE * (1 + 1 / 2 + 1 / 4)
# Bytes of matrix and shift of a step of the first level, and of what they are folded from: permutation, lower, upper
# and weight, four vectors and two log-determinants. Backward folds them and the inverses again, for all steps at once,
# and holds their gradients until all are computed.
FIRST_MAP = 4 * (12 + 1) * 12
FIRST_FACTORS = 4 * (4 * (12 + 1) * 12 + 2)


def measure(
    steps: int, levels: int, size: int = SIZE, hidden: int = HIDDEN, fake: bool = True, **options
) -> tuple[int, int]:
    """Bytes kept after the forward, and the peak, of a training step of the published benchmark."""
    with gk.use_backend("reference"):
        return training_step_bytes(
            lambda: Glow(3, size, steps, levels, hidden, **options), (BATCH, 3, size, size), fake
        )


def test_the_published_benchmark_of_eighty_steps():
    kept, peak = measure(80, 3, memory="anchor", anchor_every=4)
    assert peak <= 0.62 * GB
    # 20 anchors per level, the latents, and the tensors that the split priors keep.
    assert kept <= 20 * ALL_STATES + 3 * FIRST_STATE * (1 + 1 / 2)


def test_eight_micro_batches_of_the_published_benchmark():
    # The peak is in the first level's backward, or at the end of the forward, which keeps as much as with one batch.
    kept, _ = measure(13, 3, memory="anchor", anchor_every=6)
    _, few = measure(7, 1, memory="anchor", anchor_every=6, micro_batches=8)
    _, more = measure(13, 1, memory="anchor", anchor_every=6, micro_batches=8)
    assert more - few == FIRST_STATE + 6 * (2 * FIRST_MAP + FIRST_FACTORS)
    anchors = len(range(5, 80, 6))
    assert few + (anchors - 1) * FIRST_STATE + 73 * (2 * FIRST_MAP + FIRST_FACTORS) <= 0.18 * GB
    assert kept + (anchors - 2) * ALL_STATES <= 0.18 * GB


def test_offloaded_anchors_of_the_published_benchmark():
    # They are gone from the device, so that nothing depends on the depth but the matrices in backward.
    options = {"memory": "anchor", "anchor_every": 2, "micro_batches": 8, "offload_anchors": True}
    (kept, peak), (deeper_kept, deeper_peak) = measure(4, 3, **options), measure(6, 3, **options)
    assert deeper_kept == kept <= 4 * FIRST_STATE
    assert deeper_peak - 2 * (3 * FIRST_MAP + FIRST_FACTORS) == peak <= 0.1 * GB


@pytest.mark.parametrize(
    ("memory", "anchor_every"), [("anchor", 4), ("anchor", 2), ("checkpoint", 1), ("invert", None)]
)
def test_memory_grows_with_depth_by_the_anchors_only(memory, anchor_every):
    options = {"memory": memory, "anchor_every": anchor_every or 4}
    (kept, peak), (deeper_kept, deeper_peak) = measure(5, 3, **options), measure(9, 3, **options)
    slope = 4 / anchor_every if anchor_every else 0
    assert deeper_kept - kept == slope * ALL_STATES
    # The peak is in the backward of the first level, after that of the others.
    assert deeper_peak - peak <= 1.02 * slope * FIRST_STATE + 4 * (3 * FIRST_MAP + FIRST_FACTORS)


@pytest.mark.parametrize("memory", ["store", "anchor"])
@pytest.mark.parametrize("alike", [True, False])
def test_without_gradients_depth_takes_no_memory(memory, alike):
    x = torch.randn(8, 6, 16, 16)
    peaks = []
    for count in (3, 9):
        model = recomputing(chain([*flow_steps(count), *([] if alike else [Scaling(6)])], x), memory)
        with torch.no_grad(), LiveStorages([model]) as storages:
            z = model(x)[0]
            model.inverse(z)
        peaks.append(storages.peak)
    assert peaks[1] - peaks[0] < x.nbytes


@pytest.mark.parametrize(
    ("own_network", "memory", "states"),
    [(True, "checkpoint", 2.5), (True, "invert", -2.0), (False, "checkpoint", 4.5), (False, "invert", 1.2)],
)
def test_a_step_in_a_chain_takes_a_few_states_more_or_less_than_by_itself(own_network, memory, states):
    layers = () if own_network else (nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 6, 3, padding=1))
    peaks = []
    for count, policy in ((1, "store"), (5, memory)):
        steps = [FlowStep(6, 32, network=nn.Sequential(*layers) if layers else None) for _ in range(count)]
        model = recomputing(chain(steps, torch.randn(8, 6, 16, 16)), policy)
        with gk.use_backend("reference"):
            model(torch.randn(8, 6, 16, 16))  # steps are tried out
            with LiveStorages([model]) as storages:
                x = torch.randn(8, 6, 16, 16)
                sum(part.sum() for part in model(x)).backward()
        peaks.append(storages.peak)
    assert peaks[1] - peaks[0] < states * x.nbytes


def test_micro_batches_divide_the_working_set():
    peaks = {parts: measure(2, 1, memory="invert", micro_batches=parts)[1] for parts in (1, 2, 4, 8)}
    hidden = BATCH * HIDDEN * (SIZE // 2) ** 2 * 4
    # Three hidden activations; the rest are a few states.
    for parts, peak in peaks.items():
        assert 3 * hidden / parts < peak < 3 * hidden / parts + 9 * FIRST_STATE
    assert all(peaks[2 * parts] < 0.75 * peaks[parts] for parts in (1, 2, 4))


@pytest.mark.parametrize(("megabytes", "parts"), [(1000, 1), (300, 2), (100, 6), (1, 8)])
def test_a_budget_chooses_the_micro_batches(megabytes, parts):
    options = {"memory": "invert", "micro_batches": "auto", "memory_budget": megabytes * 1e6}
    _, peak = measure(2, 1, **options)
    _, fixed = measure(2, 1, memory="invert", micro_batches=parts)
    assert peak == fixed
    # The budget covers the working set but not the states.
    assert peak < options["memory_budget"] + 9 * FIRST_STATE or parts == BATCH


def test_a_budget_counts_filters_once():
    """Filters are as large as a hidden activation of all 32 samples, and must not count for every sample."""
    chain = ReversibleSequential([FlowStep(12, 512)], "invert", micro_batches="auto", memory_budget=16e6)
    chain(torch.randn(32, 12, 4, 4))
    assert list(chain._parts.values()) == [1]


def test_a_budget_chooses_anew_for_another_batch_and_under_autocast():
    chain = ReversibleSequential([FlowStep(4, 64)], "invert", micro_batches="auto", memory_budget=3e5)
    chain(torch.randn(1, 4, 8, 8))
    chain(torch.randn(16, 4, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        chain(torch.randn(16, 4, 8, 8))
    one, all_, half = chain._parts.values()
    assert one < half < all_


@pytest.mark.parametrize(
    "options", [{"memory": "anchor"}, {"memory": "invert", "micro_batches": 4}, {"memory": "store"}]
)
def test_real_tensors_take_what_fake_ones_do(options):
    real, fake = (measure(6, 2, 16, 32, fake=fake, **options) for fake in (False, True))
    assert real == fake


@pytest.mark.parametrize("memory", ["anchor", "invert"])
def test_a_short_chain_takes_less_than_checkpointing_of_every_step(memory):
    # It needs little more than its working set, so a state or two decide.
    for steps, size in ((1, 16), (2, 16), (4, 16), (4, 8)):
        x = torch.randn(8, 12, size, size)
        peaks = []
        for name in ("checkpoint", f"glow_kernels {memory}"):
            step = chains.training_step(chains.CHAINS[name](12, 64, steps, size), x)
            peaks.append(peak_extra_bytes(step, x.device))
        assert peaks[1] < peaks[0], (steps, size)


COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


# torch.compile uses deprecated functions of PyTorch itself.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler"))],
)
@pytest.mark.parametrize("memory", RECOMPUTING)
def test_compiled_chains_keep_no_more(memory, backend):
    x = torch.randn(4, 6, 16, 16)
    plain = ReversibleSequential([FlowStep(6, 16), FlowStep(6, 16), Scaling(6), FlowStep(6, 16)], "store")
    plain(x)
    model = recomputing(plain, memory, anchor_every=2)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def saved_bytes(function) -> int:
        storages: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results = function(x)
        gradients.append(torch.autograd.grad(weighted(results), list(model.parameters())))
        return sum(storages.values())

    gradients: list[tuple[torch.Tensor, ...]] = []
    eager = saved_bytes(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    # Plus one number per step, which stands in for its input or output.
    assert saved_bytes(compiled) <= eager + len(model) * x.element_size()
    for one, other in itertools.zip_longest(*gradients):
        assert (one - other).norm() <= 1e-5 * other.norm()
    with torch.compiler.set_stance("fail_on_recompile"):
        weighted(compiled(torch.randn_like(x))).backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("check", ["off", "replay"])
def test_a_compiled_chain_computes_with_the_parameters_that_its_graph_has(check):
    x = torch.randn(2, 4, 4, 4)
    plain = ReversibleSequential([FlowStep(4, 4) for _ in range(3)], "store")
    plain(x)
    model = recomputing(plain, "anchor", anchor_every=2, check=check, drift_limit=0.0)
    given = {name: (p.detach() + 0.1).requires_grad_() for name, p in model.named_parameters()}

    def evaluate(module, parameters, x):
        return torch.func.functional_call(module, parameters, (x,))

    expected, actual = evaluate(plain, given, x), torch.compile(evaluate, backend="aot_eager")(model, given, x)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(weighted(results), list(given.values())) for results in (actual, expected)]
    for one, other in itertools.zip_longest(*gradients):
        assert (one - other).norm() <= 1e-4 * other.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_chain_is_initialised_as_without_a_compiler():
    x = 3.0 * torch.randn(4, 4, 4, 4) + 1.0
    model = ReversibleSequential([FlowStep(4, 4) for _ in range(2)], "anchor")
    eager, never_run = copy.deepcopy(model), copy.deepcopy(model)
    z, log_det = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close((z, log_det), eager(x))
    torch.testing.assert_close(model.state_dict(), eager.state_dict())

    def refuse(*_):
        raise RuntimeError("no such backend")

    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="no such backend"):
        torch.compile(never_run, fullgraph=True, backend=aot_autograd(fw_compiler=refuse))(x)
    assert not never_run[0].actnorm.is_initialized(), "a graph that was traced and not run has set nothing"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_chain_takes_batches_of_any_size():
    model = ReversibleSequential([FlowStep(4, 4) for _ in range(2)], "anchor")
    model(torch.randn(4, 4, 4, 4))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (4, 6):
        x = torch.randn(size, 4, 4, 4, requires_grad=True)
        actual, expected = (torch.autograd.grad(weighted(chain(x)), x) for chain in (compiled, model))
        torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_chain_may_be_given_no_context():
    x, context = torch.randn(3, 6, 4, 4), torch.randn(3, 3, requires_grad=True)
    model = recomputing(chain([FlowStep(6, network=Conditioned(3, 6, context=3)) for _ in range(2)], x), "anchor")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for given in (None, context):
        needed = [*model[0].coupling.parameters(), *([] if given is None else [given])]
        actual, expected = (
            torch.autograd.grad(weighted(each(x, given)), needed, materialize_grads=True) for each in (compiled, model)
        )
        torch.testing.assert_close(actual, expected)
