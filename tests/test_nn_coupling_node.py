"""A coupling as one autograd node gives the results of its parts; the parts run if anybody can observe them."""

from __future__ import annotations

import copy

import pytest
import torch
from operators import count_calls
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import glow_kernels as gk
from glow_kernels.backends import select
from glow_kernels.nn import AdditiveCoupling, AffineCoupling, FlowStep, boundary_node
from glow_kernels.nn import coupling as coupling_module
from glow_kernels.nn import network as network_module
from glow_kernels.nn import network_passes as passes_module
from glow_kernels.ops._registry import Operator

COUPLINGS = {"affine": AffineCoupling, "additive": AdditiveCoupling}
every_coupling = pytest.mark.parametrize("kind", COUPLINGS)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with every coupling that is one node."""
    return count_calls(monkeypatch, coupling_module, "coupling_node")


def ready(kind: str, channels: int, hidden: int = 8, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """A coupling that is not the identity, with initialised ActNorms."""
    module = COUPLINGS[kind](channels, hidden, **options).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        module(torch.randn(4, channels, 3, 5, dtype=dtype))
    return module


def differentiated(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Results and all gradients."""
    x = x.detach().requires_grad_()
    y, log_det = module(x)
    generator = torch.Generator(x.device).manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device) for t in (y, log_det)]
    total = sum((t * g).sum() for t, g in zip((y, log_det), grads, strict=True))
    found = torch.autograd.grad(total, [x, *module.parameters()])
    return [y, log_det, *found]


@every_coupling
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("channels", [2, 5, 12])
def test_the_node_equals_the_formulas(fast_backend, monkeypatch, nodes, kind, channels, apart):
    monkeypatch.setattr(network_module, "adds_bias_separately", lambda x: apart)
    module = ready(kind, channels)
    x = torch.randn(3, channels, 4, 6, dtype=torch.float64)
    actual = differentiated(module, x)
    assert len(nodes) == 1
    with gk.use_backend("reference"):
        expected = differentiated(module, x)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch", [1, 3, 4, 9])
def test_a_step_that_divides_its_last_convolution_equals_the_formulas(monkeypatch, batch):
    divided = count_calls(monkeypatch, passes_module, "_convolve_backward_in_shares")
    monkeypatch.setattr(network_module, "LARGE_ON_GPU", 0)
    chain = gk.ReversibleSequential([FlowStep(6, 8).double() for _ in range(3)])
    x = torch.randn(batch, 6, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        chain(torch.randn(4, 6, 4, 6, dtype=torch.float64))
    expected = differentiated(chain, x)
    assert not divided
    monkeypatch.setattr(passes_module, "needs_workspace", lambda x: True)
    for one, other in zip(differentiated(chain, x), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert len(divided) == 3


@every_coupling
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_node_is_as_accurate_as_its_parts_under_autocast(fast_backend, monkeypatch, nodes, kind, memory_format):
    monkeypatch.setattr(network_module, "adds_bias_separately", lambda x: True)
    module = ready(kind, 6, dtype=torch.float32).to(memory_format=memory_format)
    x = torch.randn(3, 6, 4, 6)
    with gk.use_backend("reference"):
        truth = differentiated(copy.deepcopy(module).double(), x.double())
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        actual = differentiated(module, x)
        made = len(nodes)
        module.network.register_forward_hook(lambda *_: None)
        parts = differentiated(module, x)
    assert made == len(nodes) == 1
    for one, other, true in zip(actual, parts, truth, strict=True):
        assert one.dtype == other.dtype
        # Sums over few samples vary by as much as the rounding of bfloat16.
        assert (one - true).norm() <= 1.5 * (other - true).norm() + 2**-9 * true.norm()


@every_coupling
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [5, 12])
def test_padding_and_epilogues_of_matrix_units_change_nothing(
    fast_backend, monkeypatch, nodes, kind, channels, memory_format
):
    monkeypatch.setattr(passes_module, "has_tensor_cores", lambda *_: True)
    monkeypatch.setattr(network_module, "adds_bias_separately", lambda x: True)
    monkeypatch.setattr(passes_module, "_ELEMENTS", 32)  # to have several parts
    module = ready(kind, channels).to(memory_format=memory_format)
    x = torch.randn(3, channels, 4, 6, dtype=torch.float64)
    actual = differentiated(module, x)
    assert len(nodes) == 1
    with gk.use_backend("reference"):
        expected = differentiated(module, x)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_frozen_parameters_get_no_gradient(fast_backend):
    module = ready("affine", 6)
    module.network.second.requires_grad_(False)
    x = torch.randn(3, 6, 4, 6, dtype=torch.float64)
    y, log_det = module(x)
    (y.sum() + log_det.sum()).backward()
    assert all((p.grad is None) != p.requires_grad for p in module.parameters())
    everything = copy.deepcopy(module).requires_grad_()
    results = differentiated(everything, x)
    for parameter in module.network.requires_grad_(False).parameters():
        parameter.grad = None
    x.requires_grad_()
    (grad,) = torch.autograd.grad(module(x)[0], x, torch.ones_like(x))
    (expected,) = torch.autograd.grad(everything(x)[0], x, torch.ones_like(x))
    torch.testing.assert_close(grad, expected)
    assert len(results) == 2 + 1 + 9


def test_only_one_result_may_be_used(fast_backend):
    module = ready("affine", 6)
    x = torch.randn(3, 6, 4, 6, dtype=torch.float64, requires_grad=True)
    with gk.use_backend("reference"):
        expected = [torch.autograd.grad(module(x)[index].sum(), x)[0] for index in range(2)]
    for index in range(2):
        (actual,) = torch.autograd.grad(module(x)[index].sum(), x)
        torch.testing.assert_close(actual, expected[index])


def test_backward_computes_with_the_backend_of_forward(fast_backend, monkeypatch):
    asked = []
    original = passes_module.scale_all_backward

    def watched(*args):
        asked.append(select())
        return original(*args)

    monkeypatch.setattr(passes_module, "scale_all_backward", watched)
    module = ready("affine", 6)
    y, _ = module(torch.randn(3, 6, 4, 6, dtype=torch.float64, requires_grad=True))
    with gk.use_backend("reference"):
        y.sum().backward()
    assert asked == [fast_backend]


def _hooked(module: nn.Module) -> None:
    module.network.first.actnorm.register_forward_hook(lambda *_: None)


def _hooked_before(module: nn.Module) -> None:
    module.network.last.register_forward_pre_hook(lambda *_: None)


def _hooked_in_backward(module: nn.Module) -> None:
    module.network.second.register_full_backward_hook(lambda *_: None)


def _hooked_before_backward(module: nn.Module) -> None:
    module.network.second.register_full_backward_pre_hook(lambda *_: None)


def _replaced(module: nn.Module) -> None:
    original = module.network.second.forward
    module.network.second.forward = lambda *args: original(*args)


def _parametrized(module: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(module.network.first)


def _of_a_subclass(module: nn.Module) -> None:
    class Mine(AffineCoupling):
        pass

    module.__class__ = Mine


def _not_initialized(module: nn.Module) -> None:
    module.network.first.actnorm._is_initialized = False


ALTERATIONS = (
    *(_hooked, _hooked_before, _hooked_in_backward, _hooked_before_backward),
    *(_replaced, _parametrized, _of_a_subclass, _not_initialized),
)


@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda alter: alter.__name__.strip("_"))
def test_an_altered_coupling_runs_its_parts(nodes, alter):
    module = ready("affine", 6)
    alter(module)
    y, _ = module(torch.randn(3, 6, 4, 6, dtype=torch.float64))
    y.sum().backward()
    assert not nodes


@pytest.fixture
def nodes_of_chains(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with every step of a chain that is one node."""
    monkeypatch.setattr(Operator, "is_fast", lambda *_: False)
    return count_calls(monkeypatch, boundary_node, "coupling_node")


def ready_chain(channels: int = 6, **options: str) -> tuple[gk.ReversibleSequential, Tensor]:
    """A chain of three steps that are not the identity, and data for it."""
    chain = gk.ReversibleSequential([FlowStep(channels, 8, **options) for _ in range(3)], "store").double()
    x = torch.randn(3, channels, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        chain(x)
        for parameter in chain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return chain, x


def assert_equals_the_reference(chain: nn.Module, x: Tensor) -> None:
    actual = differentiated(chain, x)
    with gk.use_backend("reference"):
        expected = differentiated(chain, x)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@every_coupling
@pytest.mark.parametrize(("mixing", "channels"), [("lu", 5), ("plain", 6), ("shuffle", 2)])
def test_a_step_of_a_chain_is_one_node(fast_backend, nodes_of_chains, kind, mixing, channels):
    chain, x = ready_chain(channels, coupling=kind, mixing=mixing)
    nodes_of_chains.clear()
    assert_equals_the_reference(chain, x)
    assert len(nodes_of_chains) == 3
    with torch.no_grad():
        actual = chain(x)
    for one, other in zip(actual, chain(x), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("learned", ["network", "actnorm", "mixing.upper", "coupling.network.second.weight"])
def test_a_step_gives_gradients_to_what_is_learned_alone(fast_backend, nodes_of_chains, learned):
    chain, x = ready_chain()
    for name, parameter in chain.named_parameters():
        parameter.requires_grad_(learned in name)

    def gradients() -> list[Tensor | None]:
        z, log_det = chain(x)
        (z.square().sum() + log_det.sum()).backward()
        found = [parameter.grad for parameter in chain.parameters()]
        chain.zero_grad()
        return found

    actual = gradients()
    with gk.use_backend("reference"):
        expected = gradients()
    for one, other, parameter in zip(actual, expected, chain.parameters(), strict=True):
        assert (one is None) == (other is None) == (not parameter.requires_grad)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def _hooked_itself(coupling: nn.Module) -> None:
    coupling.register_forward_hook(lambda *_: None)


def _on_the_other_half(coupling: nn.Module) -> None:
    coupling.condition_on = "second"


CHAIN_ALTERATIONS = (*ALTERATIONS, _hooked_itself, _on_the_other_half)


@pytest.mark.parametrize("alter", CHAIN_ALTERATIONS, ids=lambda alter: alter.__name__.strip("_"))
def test_a_chain_notices_an_altered_coupling(fast_backend, nodes_of_chains, alter):
    chain, x = ready_chain()
    chain(x)
    nodes_of_chains.clear()
    alter(chain[1].coupling)
    assert_equals_the_reference(chain, x)
    assert len(nodes_of_chains) == 2


def test_a_chain_notices_a_hook_of_all_modules(nodes_of_chains):
    chain, x = ready_chain()
    nodes_of_chains.clear()
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        chain(x)
    assert not nodes_of_chains


def _other_parameter(coupling: nn.Module) -> None:
    coupling.network.first.weight = nn.Parameter(torch.randn(8, 3, 3, 3, dtype=torch.float64))


def _other_layer(coupling: nn.Module) -> None:
    coupling.network.last = copy.deepcopy(coupling.network.last)
    with torch.no_grad():
        coupling.network.last.weight.add_(0.1)


def _other_network(coupling: nn.Module) -> None:
    coupling.network = ready("affine", 6).network


def _other_options(coupling: nn.Module) -> None:
    coupling.scale_map, coupling.layout, coupling.order = gk.ScaleMap("tanh"), "chunk_scale_shift", "scale_shift"


def _attribute_in_front_of_a_parameter(coupling: nn.Module) -> None:
    coupling.network.second.__dict__["weight"] = torch.randn(8, 8, 1, 1, dtype=torch.float64)


def _attribute_in_place_of_a_parameter(coupling: nn.Module) -> None:
    actnorm = coupling.network.first.actnorm
    actnorm.__dict__["bias"] = actnorm._parameters.pop("bias").detach() + 1.0


CHANGES = (
    *(_other_parameter, _other_layer, _other_network, _other_options),
    *(_attribute_in_front_of_a_parameter, _attribute_in_place_of_a_parameter),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_chain_computes_with_what_has_changed(fast_backend, nodes_of_chains, change):
    chain, x = ready_chain()
    before, _ = chain(x)
    nodes_of_chains.clear()
    change(chain[1].coupling)
    after, _ = chain(x)
    assert not torch.equal(before, after)
    with gk.use_backend("reference"):
        expected, _ = chain(x)
    torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-9)
    assert len(nodes_of_chains) == 3


def test_a_chain_computes_with_the_parameters_of_a_functional_call(nodes_of_chains):
    chain, x = ready_chain()
    parameters = {name: (p.detach() + 0.1).requires_grad_() for name, p in chain.named_parameters()}
    z, _ = torch.func.functional_call(chain, parameters, (x,))
    grads = torch.autograd.grad(z.square().sum(), list(parameters.values()))
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(0.1)
    expected, _ = chain(x)
    wanted = torch.autograd.grad(expected.square().sum(), list(chain.parameters()))
    for one, other in zip((z, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_chain_computes_in_the_type_that_it_has_now(fast_backend, nodes_of_chains):
    chain, x = ready_chain()
    expected, _ = chain(x)
    nodes_of_chains.clear()
    actual, _ = chain.float()(x.float())
    assert len(nodes_of_chains) == 3
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_a_chain_changes_no_gradient(fast_backend, nodes_of_chains):
    chain, x = ready_chain()
    leaves = [x.requires_grad_(), *chain.parameters()]
    expected = torch.autograd.grad(chain(x)[0].square().sum(), leaves)
    z, _ = checkpoint(chain, x, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(z.square().sum(), leaves), expected, strict=True):
        assert torch.equal(one, other)


def test_second_derivatives_of_a_chain_are_refused(fast_backend, nodes_of_chains):
    chain, x = ready_chain()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(chain(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="memory='store'"):
        grad.square().sum().backward()


def test_parts_compute_where_gradients_have_gradients(nodes):
    module = ready("affine", 6)
    with gk.use_backend("reference"):
        x = torch.randn(3, 6, 4, 6, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
        grad.square().sum().backward()
    assert not nodes


@every_coupling
@pytest.mark.parametrize("power", [1, 3])
def test_second_derivatives_are_refused(fast_backend, kind, power):
    module = ready(kind, 6)
    x = torch.randn(3, 6, 4, 6, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad((module(x)[0] ** power).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="memory='store'"):
        grad.square().sum().backward()


@every_coupling
def test_forward_derivatives_have_parts(fast_backend, nodes, kind):
    module = ready(kind, 6)
    x, tangent = torch.randn(2, 3, 6, 4, 6, dtype=torch.float64)
    with forward_ad.dual_level():
        found = [forward_ad.unpack_dual(each).tangent for each in module(forward_ad.make_dual(x, tangent))]
    step = 1e-6
    after, before = module(x + step * tangent), module(x - step * tangent)
    assert len(nodes) == 2
    for derivative, one, other in zip(found, after, before, strict=True):
        expected = (one - other) / (2 * step)
        torch.testing.assert_close(
            expected.new_zeros(()).expand_as(expected) if derivative is None else derivative,
            expected,
            rtol=1e-6,
            atol=1e-6,
        )


def test_autocast_does_not_convert_float64(backend):
    module, x = ready("affine", 6), torch.randn(3, 6, 4, 6, dtype=torch.float64)
    expected = module(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(module(x), expected, strict=True))


def test_a_network_that_does_not_fit_is_named(backend):
    module = ready("affine", 6)
    module.network = ready("additive", 6).network
    with pytest.raises(ValueError, match="h must be"):
        module(torch.randn(3, 6, 4, 6, dtype=torch.float64))
