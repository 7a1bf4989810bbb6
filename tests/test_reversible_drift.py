"""Gradients in float32 are those of autograd, even for batches that give NaN in a chain without anchors.

Tested are a Glow with 32 steps, trained on photographs, with noise, saturated pixels and one bad row in one image; and
a chain of 64 steps that contracts without ActNorm's initialisation. Autograd through the same steps is the truth, and
the check at the anchors detects where inversion alone fails.
"""

from __future__ import annotations

import pytest
import torch
from test_reversible import weighted
from torch import Tensor

from glow_kernels import ReversibleSequential
from glow_kernels.models import Glow
from glow_kernels.nn import ActNorm, FlowStep
from glow_kernels.training import data

STEPS = 32


def glow(**options) -> Glow:
    return Glow(3, 8, STEPS, 1, 16, **options)


@pytest.fixture(scope="module")
def trained() -> tuple[Glow, Tensor]:
    """A Glow after a hundred steps, and eight of its training images."""
    torch.manual_seed(0)
    photographs = data.load("patches", image_size=8)
    model = glow(memory="anchor")
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    # For convolutions this small, oneDNN's set-up takes longer than the computation.
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        model.initialize(model.dequantize(photographs.train[:64]))
        for step in range(100):
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 100)
            x = model.dequantize(photographs.train[torch.randint(len(photographs.train), (16,))])
            optimizer.zero_grad()
            model.bits_per_dim(x).mean().backward()
            optimizer.step()
    return model, model.dequantize(photographs.train[:8])


def bad_row(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, :, 4] = 4.0 * torch.rand(3, 8) - 2.0
    return x


POISONED = {
    "clean": lambda x: x,
    "noise": lambda x: torch.rand_like(x) - 0.5,
    "saturated": lambda x: (20.0 * x).clamp(-0.5, 0.5),
    "black-and-white": lambda x: 0.5 * x.mean(dim=1, keepdim=True).sign().expand_as(x),
    "bad-row": bad_row,
}


def gradient(model: Glow, x: Tensor, **options) -> tuple[Tensor, Glow]:
    """All gradients as one vector."""
    twin = glow(**options)
    twin.load_state_dict(model.state_dict())
    twin.bits_per_dim(x).mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in twin.parameters()]), twin


@pytest.mark.parametrize("name", POISONED)
def test_gradients_of_poisoned_batches_with_the_defaults(trained, name):
    model, x = trained[0], POISONED[name](trained[1])
    expected, _ = gradient(model, x)
    actual, _ = gradient(model, x, memory="anchor")
    assert expected.isfinite().all()
    assert (actual - expected).norm() <= (1e-6 if name == "clean" else 1e-4) * expected.norm()


@pytest.mark.parametrize("name", ["noise", "bad-row"])
def test_inverting_everything_fails_and_is_caught(trained, name):
    model, x = trained[0], POISONED[name](trained[1])
    expected, _ = gradient(model, x)
    actual, twin = gradient(model, x, memory="invert", check="flag")
    assert not (actual - expected).norm() <= 1e-2 * expected.norm()
    assert max(twin.levels[0].steps.drift().values()) > 1e-2
    with pytest.raises(RuntimeError, match=r"^step 0 .*: the state after it was reconstructed with"):
        gradient(model, x, memory="invert", check="raise")


@pytest.mark.parametrize(
    "options", [{"memory": "anchor"}, {"memory": "invert"}, {"memory": "anchor", "anchor_every": 8}]
)
def test_clean_batches_pass_the_check(trained, options):
    model, x = trained
    _, twin = gradient(model, x, **options, check="raise")
    drift = twin.levels[0].steps.drift()
    assert 0 < max(drift.values()) < 1e-5
    if options["memory"] == "anchor":
        every = options.get("anchor_every", 4)
        # The steps after the last anchor start from the chain's output, which is exact, so nothing is checked there.
        assert list(drift) == [0, *range(every - 1, STEPS - 1, every)]


@pytest.mark.parametrize("memory", ["anchor", "checkpoint"])
def test_an_untrained_chain_that_contracts(memory):
    steps = [FlowStep(6, 8, mixing="plain") for _ in range(64)]
    for module in (module for step in steps for module in step.modules()):
        if isinstance(module, ActNorm):
            module.initialized.fill_(True)
            module._is_initialized = True
    x = torch.randn(4, 6, 4, 4)
    results = []
    for policy in ("store", memory):
        chain = ReversibleSequential(steps, policy)
        grads = torch.autograd.grad(weighted(chain(x)), list(chain.parameters()))
        results.append(torch.cat([grad.flatten() for grad in grads]))
    assert results[1].isfinite().all()
    assert (results[1] - results[0]).norm() <= 1e-4 * results[0].norm()
    # 64 scales of sigmoid(2) shrink one half to a thousandth.
    with pytest.raises(RuntimeError, match=r"^step 0 "):
        weighted(ReversibleSequential(steps, "invert", check="raise", drift_limit=1e-6)(x)).backward()


def test_sixty_four_steps_in_float32():
    torch.manual_seed(1)
    steps = [FlowStep(6, 16) for _ in range(64)]
    x = torch.randn(8, 6, 8, 8)
    # Trained in float64, since in float32 the trained weights differ between processors.
    chain = ReversibleSequential(steps, "anchor").double()
    optimizer = torch.optim.Adam(chain.parameters(), lr=1e-3)
    for _ in range(15):  # towards a standard normal
        optimizer.zero_grad()
        z, log_det = chain(x.double())
        (0.5 * z.square().flatten(1).sum(1) - log_det).mean().backward()
        optimizer.step()
    chain.float()
    results = []
    for policy in ("store", "anchor", "invert"):
        grads = torch.autograd.grad(weighted(ReversibleSequential(steps, policy)(x)), list(chain.parameters()))
        results.append(torch.cat([grad.flatten() for grad in grads]))
    for actual in results[1:]:
        assert (actual - results[0]).norm() <= 1e-4 * results[0].norm()
