"""``accelerate`` on a real GPU with PyTorch's defaults: convolutions in TF32."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from dialects import chrischute, openai, pclucas14, rosinality, survae
from torch import Tensor, nn

import glow_kernels as gk

DEVICE = "cuda"

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:torch.lu is deprecated", "ignore:torch.triangular_solve is deprecated"),
]


def negative_log_likelihood(model: nn.Module, x: Tensor) -> Tensor:
    """Of a transform that returns latents and log-determinant, up to a constant."""
    z, log_det = model(x)
    return (0.5 * z.square().flatten(1).sum(1) - log_det).mean()


# Only models that need none of the libraries, which may not be installed on a machine with a GPU.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "rosinality": (lambda: rosinality.Glow(3, 2, 1, filter_size=16), rosinality.loss),
    "rosinality_plain": (lambda: rosinality.Glow(3, 2, 1, filter_size=16, conv_lu=False), rosinality.loss),
    "chaiyujin": (lambda: openai.Glow(3, 16, 2, 1), openai.loss),
    "pclucas14": (pclucas14.Glow, pclucas14.loss),
    "chrischute": (chrischute.Glow, chrischute.loss),
    "survae": (survae.Flow, negative_log_likelihood),
}


@pytest.fixture(autouse=True)
def _as_by_default():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = before


def results(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The loss, and the gradients of all parameters concatenated."""
    value = loss(model, x)
    gradients = torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return [value.detach(), torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])]


@pytest.mark.parametrize("options", [{}, {"memory": "anchor"}], ids=["store", "anchor"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_accelerated_and_as_accurate(name, options):
    make, loss = MODELS[name]
    torch.manual_seed(0)
    with torch.device("cpu"):
        model, x = make(), torch.randn(16, 3, 8, 8)
    model.to(DEVICE)
    x = x.to(DEVICE)
    with torch.no_grad():
        loss(model, x)  # initialises ActNorm
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # networks start at zero
    # Convolutions are exact on a CPU.
    truth, before = results(copy.deepcopy(model).cpu(), loss, x.cpu()), results(model, loss, x)
    report = gk.accelerate(model, **options)
    assert report.patched
    assert not report.left_alone, report
    for true, original, ours in zip(truth, before, results(model, loss, x), strict=True):
        error, allowed = ((value.cpu() - true).norm() / true.norm() for value in (ours, original))
        assert error <= 2.0 * allowed + 1e-4
