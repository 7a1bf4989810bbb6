"""Sizes and strides beyond 2^31 elements in little memory: views that touch only a few pages of a sparse file.

Proven: every operator handles strides of more than 31 bits, and tensors of more than 2^31 elements.
"""

from __future__ import annotations

import math

import pytest
import torch
from operators import assert_same_bits
from torch import Tensor

import glow_kernels as gk

BEYOND = 2**31 + 4096
SHAPE = (2, 2, 3)
# Strides of batch, channels and positions, in elements.
STRIDES = {"batch": (BEYOND, 64, 1), "channel": (64, BEYOND, 1), "position": (8, 1, BEYOND // 2 + 4096)}


@pytest.fixture
def far_apart(tmp_path):
    """A function that copies tensors into views of a sparse file with given strides."""

    def lay(tensor: Tensor, strides: tuple[int, ...], name: str) -> Tensor:
        # h, with twice the channels, needs room too.
        size = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, strides, strict=True))
        memory = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=tensor.dtype)
        return memory.as_strided(tensor.shape, strides).copy_(tensor)

    return lay


def parameters(channels: int) -> list[Tensor]:
    """log_scale, bias and weight."""
    return [torch.randn(channels), torch.randn(channels), torch.randn(channels, channels)]


OPERATORS = {
    "actnorm_conv1x1": lambda x, h: gk.actnorm_conv1x1(x, *parameters(2)),
    "actnorm_conv1x1_reversible": lambda x, h: gk.ops.actnorm_conv1x1_reversible_backward(
        x, torch.ones(2), x, *parameters(2)
    )[:5],
    "affine_coupling": gk.affine_coupling,
    "affine_coupling_inverse": gk.affine_coupling_inverse,
    "affine_coupling_reversible": lambda x, h: gk.ops.affine_coupling_reversible_backward(x, torch.ones(2), x, h)[:3],
    "gaussian_log_prob": lambda x, h: (gk.gaussian_log_prob(x, h),),
    "gaussian_sample": lambda x, h: (gk.gaussian_sample(x, h),),
    "actnorm_statistics": lambda x, h: gk.actnorm_statistics(x),
}


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES.keys())
@pytest.mark.parametrize("name", OPERATORS)
def test_strides_of_more_than_31_bits(backend, far_apart, name, strides):
    x, h = torch.randn(SHAPE), torch.randn(2, 4, 3)
    results = []
    for lay in (lambda tensor, _: tensor, lambda tensor, file: far_apart(tensor, strides, file)):
        torch.manual_seed(0)
        results.append(OPERATORS[name](lay(x, "x"), lay(h, "h")))
    # The order of sums may depend on the strides.
    for near, far in zip(*results, strict=True):
        torch.testing.assert_close(far, near, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("native" not in gk.available_backends(), reason="the reference would need 8 GB for temporaries")
def test_more_than_31_bits_of_elements():
    z, h = torch.zeros(()).expand(1, 1, BEYOND), torch.zeros(()).expand(1, 2, BEYOND)
    with gk.use_backend("native"):
        log_prob = gk.gaussian_log_prob(z, h)
    assert_same_bits([log_prob], [torch.tensor([-0.5 * math.log(2 * math.pi) * BEYOND])])
