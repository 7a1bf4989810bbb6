"""Chains that recompute, with the linear map of a step fused with the coupling before it: gradients, memory, number of
operators. Every backend except the reference is treated as one that has the fused operator.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from operators import count_calls
from test_nn_boundary_node import ALTERATIONS, chain, differentiated, operators_per_step
from test_reversible import recomputing

import glow_kernels as gk
from glow_kernels.bench.live_storages import training_step_bytes
from glow_kernels.models import Glow
from glow_kernels.ops._registry import Operator
from glow_kernels.reversible import plain_step

POLICIES = {
    "checkpoint": {"memory": "checkpoint"},
    "anchor": {"memory": "anchor", "anchor_every": 2},
    "rare anchors": {"memory": "anchor", "anchor_every": 4},
    "invert": {"memory": "invert"},
    "micro-batches": {"memory": "anchor", "anchor_every": 2, "micro_batches": 2},
    "inverted micro-batches": {"memory": "invert", "micro_batches": 3},
    "offloaded": {"memory": "anchor", "anchor_every": 2, "offload_anchors": True},
    "flag": {"memory": "anchor", "anchor_every": 2, "check": "flag"},
    "replay": {"memory": "anchor", "anchor_every": 3, "check": "replay"},
    "replay at once": {"memory": "anchor", "anchor_every": 2, "check": "replay", "drift_limit": 0.0},
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Treat every backend except the reference as one that has the operator; the list grows with every forward."""
    monkeypatch.setattr(Operator, "is_fast", lambda *_: True)
    return count_calls(monkeypatch, plain_step, "boundary_forward")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("mixing", "channels"), [("lu", 6), ("plain", 5), ("reverse", 2)])
def test_gradients_are_those_of_autograd(fast_backend, taken, policy, mixing, channels):
    plain, x = chain(channels, 6, mixing=mixing)
    model = recomputing(plain, **POLICIES[policy])
    actual = differentiated(model, x)
    assert len(taken) >= 5
    if POLICIES[policy].get("check") == "flag":
        assert set(model.drift()) == {0, 1, 3}
        assert max(model.drift().values()) < 1e-12
    with gk.use_backend("reference"):
        expected = differentiated(plain, x)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("used", [(0,), (1,)])
@pytest.mark.parametrize("policy", ["checkpoint", "anchor", "invert"])
def test_one_result_alone_may_be_used(fast_backend, taken, policy, used):
    plain, x = chain()
    actual = differentiated(recomputing(plain, **POLICIES[policy]), x, used)
    with gk.use_backend("reference"):
        expected = differentiated(plain, x, used)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda alter: alter.__name__.strip("_"))
def test_an_altered_step_is_not_joined_with_its_neighbours(fast_backend, taken, alter):
    plain, x = chain()
    alter(plain[1])
    actual = differentiated(recomputing(plain, "anchor", anchor_every=2), x)
    assert not taken
    with gk.use_backend("reference"):
        expected = differentiated(plain, x)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory", ["anchor", "invert"])
def test_gradients_may_be_asked_for_twice(fast_backend, taken, memory):
    plain, x = chain()
    z, log_det = recomputing(plain, memory, anchor_every=2)(x.requires_grad_())
    kept = z.detach().clone()
    first, second = (torch.autograd.grad(z.sum() + log_det.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(z, kept)


def test_inverted_weights_that_are_singular_are_named(fast_backend, taken):
    plain, x = chain(mixing="plain")
    with torch.no_grad():
        plain[2].mixing.weight[0] = 0.0
    z, _ = recomputing(plain, "checkpoint")(x)
    z.sum().backward()  # checkpointing inverts nothing
    z, _ = recomputing(plain, "anchor", anchor_every=2)(x)
    with pytest.raises(ValueError, match=r"^step 2 \(FlowStep\): weight must be invertible"):
        z.sum().backward()


@pytest.mark.parametrize(
    "options", [{"memory": "anchor"}, {"memory": "invert"}, {"memory": "anchor", "micro_batches": 4}]
)
def test_no_more_memory_is_taken(fast_backend, monkeypatch, options):
    """As many anchors, and at the peak, which is in the backward of a network, no more states."""

    def measure(crosses: bool) -> tuple[int, int]:
        monkeypatch.setattr(Operator, "is_fast", lambda *_: crosses)
        return training_step_bytes(lambda: Glow(3, 16, 9, 2, 32, **options), (8, 3, 16, 16), fake=False)

    assert measure(True) <= measure(False)


@pytest.mark.parametrize(
    ("channels", "pads_input", "pads_output"), [(12, True, True), (24, True, False), (48, False, False)]
)
def test_operators_of_a_training_step_on_matrix_units(monkeypatch, channels, pads_input, pads_output):
    """Four steps, one of them anchored. Each operator is at least one launch, so adding one should be noticed."""
    forward, backward = operators_per_step(monkeypatch, channels, steps=4, memory="anchor")
    network = {
        "bias_relu_pad" if pads_input else "_to_copy": 4,
        "scale_filters_forward_all": 4,
        "convolution": 8,
        "bias_relu_forward": 4,
        "_addmm_activation": 4,
    }
    # On a GPU the log-determinants of a whole chain are added in one launch.
    assert forward == Counter({**network, "coupling_conv1x1_forward": 4, "add": 4})
    again = {
        "coupling_conv1x1_backward": 1,
        "actnorm_conv1x1_apply_reversible_backward": 3,
        "affine_coupling_in_place_backward": 3,
        "add_": 4,
        "convolution_backward": 12,
        "bias_relu_backward": 8,
        "scale_filters_backward_all": 4,
    }
    of_output = {"bias_relu_pad" if pads_output else "bias_relu_bias_backward": 4}
    assert backward == Counter(network) + Counter(again) + Counter(of_output)
