"""The boundary between two steps as one autograd node: it gives the results of separate steps, and is not used if its
parts can be observed, for example by hooks. Every backend except the reference is treated as one that has the operator.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from operators import count_calls
from test_nn import ready
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import glow_kernels as gk
from glow_kernels import ReversibleSequential, backends
from glow_kernels.backends import select
from glow_kernels.backends.native import support as native_support
from glow_kernels.backends.triton import support
from glow_kernels.models import Glow
from glow_kernels.nn import ActNorm, AffineCoupling, FlowStep, boundary_node
from glow_kernels.nn import network as network_module
from glow_kernels.nn import network_passes as passes_module
from glow_kernels.ops._registry import Operator


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with every boundary that is one node."""
    return count_calls(monkeypatch, boundary_node, "boundary_node")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Treat every backend except the reference as one that has the operator."""
    monkeypatch.setattr(Operator, "is_fast", lambda *_: True)


def chain(
    channels: int = 6, count: int = 4, memory: str = "store", dtype: torch.dtype = torch.float64, **options: str
) -> tuple[ReversibleSequential, Tensor]:
    """A chain of steps that are not the identity, and data for it."""
    x = torch.randn(3, channels, 4, 5, dtype=dtype)
    return ready(ReversibleSequential([FlowStep(channels, 8, **options) for _ in range(count)], memory), x), x


def differentiated(model: nn.Module, x: Tensor, used: tuple[int, ...] = (0, 1)) -> list[Tensor | None]:
    """Results of a chain, and the gradients of the ``used`` ones."""
    x = x.detach().requires_grad_()
    results = model(x)
    generator = torch.Generator(x.device).manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device) for t in results]
    total = sum((results[index] * grads[index]).sum() for index in used)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [*results, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("coupling", "mixing", "channels"),
    [
        ("affine", "lu", 6),
        ("affine", "plain", 5),
        ("affine", "reverse", 2),
        ("affine", "shuffle", 12),
        ("additive", "lu", 5),
    ],
)
def test_the_nodes_equal_the_steps(fast_backend, monkeypatch, nodes, coupling, mixing, channels, apart):
    monkeypatch.setattr(network_module, "adds_bias_separately", lambda x: apart)
    model, x = chain(channels, coupling=coupling, mixing=mixing)
    actual = differentiated(model, x)
    assert len(nodes) == (3 if coupling == "affine" else 0)
    with gk.use_backend("reference"):
        expected = differentiated(model, x)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_model_is_as_accurate_with_nodes(fast_backend, monkeypatch, nodes, memory_format, low_precision):
    x = torch.rand(3, 3, 8, 8) - 0.5
    model = ready(Glow(3, 8, steps=3, levels=2, hidden_channels=8), x).to(memory_format=memory_format)

    def step(model: nn.Module, x: Tensor) -> list[Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low_precision and x.dtype == torch.float32):
            loss = model.bits_per_dim(x).mean()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    with gk.use_backend("reference"):
        truth = step(copy.deepcopy(model).double(), x.double())
    actual = step(model, x)
    assert len(nodes) == 4
    monkeypatch.setattr(Operator, "is_fast", lambda *_: False)
    parts = step(model, x)
    unit = 2**-8 if low_precision else 2**-20
    for one, other, true in zip(actual, parts, truth, strict=True):
        assert one.dtype == other.dtype
        # Sums over few samples vary by as much as the rounding of bfloat16.
        assert (one - true).norm() <= 1.5 * (other - true).norm() + unit * true.norm() + unit


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("used", [(0,), (1,)])
def test_one_result_alone_may_be_used(fast_backend, used):
    model, x = chain()
    actual = differentiated(model, x, used)
    with gk.use_backend("reference"):
        expected = differentiated(model, x, used)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("frozen", ["mixing", "actnorm", "network", "network.second", ""])
def test_frozen_parameters_get_no_gradient(fast_backend, frozen):
    model, x = chain()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)  # "" is in every name
    actual = differentiated(model, x)
    with gk.use_backend("reference"):
        expected = differentiated(model, x)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    (model(x)[0].sum() if frozen else model(x.requires_grad_())[0].sum()).backward()
    assert all((p.grad is None) != p.requires_grad for p in model.parameters())


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("memory", ["store", "checkpoint", "anchor", "invert"])
def test_without_gradients_every_policy_has_nodes(backend, nodes, memory):
    model, x = chain(memory=memory)
    with torch.no_grad():
        actual = model(x)
        assert len(nodes) == (3 if backend != "reference" else 0)
        with gk.use_backend("reference"):
            expected = model(x)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    nodes.clear()
    model(x)
    assert len(nodes) == (3 if backend != "reference" and memory == "store" else 0)


@pytest.mark.usefixtures("taken")
def test_no_more_is_kept(fast_backend, monkeypatch):
    model, x = chain(dtype=torch.float32)

    def kept() -> int:
        storages: dict[int, Tensor] = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
        )
        with hooks, torch.autocast(x.device.type, torch.bfloat16):
            results = model(x)
        del results
        own = {p.untyped_storage().data_ptr() for p in [x, *model.parameters(), *model.buffers()]}
        return sum(t.untyped_storage().nbytes() for at, t in storages.items() if at not in own)

    with_nodes = kept()
    monkeypatch.setattr(Operator, "is_fast", lambda *_: False)
    assert with_nodes <= kept()


@pytest.mark.usefixtures("taken")
def test_backward_computes_with_the_backend_of_forward(fast_backend, monkeypatch):
    asked = []
    original = boundary_node.boundary_backward

    def watched(*args):
        asked.append(select())
        return original(*args)

    monkeypatch.setattr(boundary_node, "boundary_backward", watched)
    model, x = chain()
    z, _ = model(x)
    with gk.use_backend("reference"):
        z.sum().backward()
    assert asked == [fast_backend] * 3


@pytest.mark.usefixtures("taken")
def test_gradients_may_be_asked_for_twice(fast_backend):
    model, x = chain()
    z, log_det = model(x.requires_grad_())
    first, second = (torch.autograd.grad(z.sum() + log_det.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def _hooked(step: nn.Module) -> None:
    step.register_forward_hook(lambda *_: None)


def _hooked_coupling(step: nn.Module) -> None:
    step.coupling.register_forward_pre_hook(lambda *_: None)


def _hooked_network(step: nn.Module) -> None:
    step.coupling.network.last.register_full_backward_hook(lambda *_: None)


def _replaced(step: nn.Module) -> None:
    original = step.coupling.forward
    step.coupling.forward = lambda *args: original(*args)


def _of_a_subclass(step: nn.Module) -> None:
    class Mine(AffineCoupling):
        pass

    step.coupling.__class__ = Mine


def _of_another_half(step: nn.Module) -> None:
    step.coupling.condition_on = "second"


def _with_another_network(step: nn.Module) -> None:
    step.coupling.network = nn.Sequential(step.coupling.network)


ALTERATIONS = (_hooked_coupling, _hooked_network, _replaced, _of_a_subclass, _of_another_half, _with_another_network)


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda alter: alter.__name__.strip("_"))
def test_an_altered_coupling_is_called(fast_backend, nodes, alter):
    model, x = chain()
    alter(model[1])
    actual = differentiated(model, x)
    # Those of step 0 and of step 2 have nothing to do with it.
    assert len(nodes) == 2
    with gk.use_backend("reference"):
        expected = differentiated(model, x)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("taken")
def test_hooked_steps_are_called(nodes):
    model, x = chain()
    _hooked(model[1])
    model(x)
    assert not nodes


@pytest.mark.usefixtures("taken")
def test_a_compiled_chain_has_no_nodes(nodes):
    torch._dynamo.reset()
    model, x = chain(count=3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for one, other in zip(differentiated(compiled, x), differentiated(copy.deepcopy(model), x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    nodes.clear()
    compiled(x)
    assert not nodes


@pytest.mark.parametrize(("dtype", "made"), [(torch.float32, 3), (torch.float64, 0)], ids=str)
def test_the_backend_is_asked_for_the_operator(backend, nodes, dtype, made):
    if backend != "triton" and not (backend == "native" and native_support._is_host_shim()):
        pytest.skip("on the CPU Triton's interpreter and the CUDA sources as C++ have it, for float32")
    model, x = chain(dtype=dtype)
    differentiated(model, x)
    assert len(nodes) == made


class Launched(TorchDispatchMode):
    """Counts operators that compute something, not views, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(result.alias_info and not result.alias_info.is_write for result in function._schema.returns)
        name = function.name().split("::")[1].partition(".")[0]
        if not is_view and name not in ("empty", "new_empty", "new_empty_strided", "empty_like", "device"):
            self.count[name.removesuffix("_triton")] += 1
        return function(*args, **(kwargs or {}))


class Counts(NamedTuple):
    """Operators of one flow step, by name, in forward and backward."""

    forward: Counter[str]
    backward: Counter[str]


def operators_per_step(monkeypatch: pytest.MonkeyPatch, channels: int, steps: int = 1, **options: Any) -> Counts:
    """The operators that ``steps`` more flow steps add to a chain, in bfloat16 on tensor cores."""
    monkeypatch.setattr(passes_module, "has_tensor_cores", lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(network_module, "adds_bias_separately", lambda x: True)
    monkeypatch.setattr(backends, "candidates", lambda: ("triton",))
    monkeypatch.setattr(backends, "select", lambda: "triton")
    monkeypatch.setattr(support, "_on_device", lambda *_: True)

    def launched(count: int) -> Counts:
        with FakeTensorMode():
            model = ReversibleSequential([FlowStep(channels, 512) for _ in range(count)], **options)
            for module in model.modules():
                if isinstance(module, ActNorm):
                    module._is_initialized = True
                if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 4:
                    module.weight = nn.Parameter(module.weight.detach().contiguous(memory_format=torch.channels_last))
            x = torch.rand(64, channels, 16, 16)
            with Launched() as forward, torch.autocast("cpu", torch.bfloat16):
                z, log_det = model(x)
            total = z.sum() + log_det.sum()
            with Launched() as backward:
                torch.autograd.grad(total, list(model.parameters()))
        return Counts(forward.count, backward.count)

    more, fewer = launched(4 + steps), launched(4)
    return Counts(more.forward - fewer.forward, more.backward - fewer.backward)


@pytest.mark.parametrize(
    ("channels", "pads_input", "pads_output"), [(12, True, True), (24, True, False), (48, False, False)]
)
def test_operators_of_a_training_step_on_matrix_units(monkeypatch, channels, pads_input, pads_output):
    """Each operator is at least one launch, so adding one should be noticed."""
    forward, backward = operators_per_step(monkeypatch, channels, memory="store")
    assert forward == Counter(
        {
            "bias_relu_pad" if pads_input else "_to_copy": 1,
            "scale_filters_forward_all": 1,
            "convolution": 2,
            "bias_relu_forward": 1,
            "_addmm_activation": 1,
            "coupling_conv1x1_forward": 1,
            "add": 1,  # log-determinants, which on a GPU are summed together
        }
    )
    assert backward == Counter(
        {
            "coupling_conv1x1_backward": 1,
            "bias_relu_pad" if pads_output else "bias_relu_bias_backward": 1,
            "convolution_backward": 3,
            "bias_relu_backward": 2,
            "scale_filters_backward_all": 1,
            "add_": 1,
        }
    )


def test_where_no_backend_has_the_operator_there_are_no_nodes(fast_backend, monkeypatch, nodes):
    monkeypatch.setattr(Operator, "is_fast", lambda *_: False)
    model, x = chain()
    model(x)
    assert not nodes
