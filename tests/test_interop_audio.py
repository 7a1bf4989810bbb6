"""``accelerate`` on the layers of WaveGlow and Glow-TTS: sequences, masks, a convolution shared by channel groups."""

from __future__ import annotations

import copy

import pytest
import torch
from dialects import audio
from torch import nn

import glow_kernels as gk


def test_stale_inverse_of_waveglow_is_not_imitated():
    layer = audio.Invertible1x1Conv(8)
    z = torch.randn(2, 8, 10)
    layer(layer(z)[0], reverse=True)
    report = gk.accelerate(layer)
    assert len(report.patched) == 1
    assert "follows its weight" in str(report)
    with torch.no_grad():
        layer.conv.weight *= 1.1
        torch.testing.assert_close(layer(layer(z)[0], reverse=True), z)
        gk.restore(layer)
        assert (layer(layer(z)[0], reverse=True) - z).abs().max() > 0.01


def test_log_determinant_of_waveglow_covers_the_batch_and_survives_a_negative_determinant():
    layer = audio.Invertible1x1Conv(8)
    z = torch.randn(2, 8, 10)
    expected = layer(z)[1]
    gk.accelerate(layer)
    torch.testing.assert_close(layer(z)[1], expected, atol=1e-5, rtol=0.0)
    with torch.no_grad():
        layer.conv.weight[0] *= -1
    torch.testing.assert_close(layer(z)[1], expected, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("make", [lambda: audio.InvConvNear(8), lambda: audio.CouplingBlock(8, 6)])
@pytest.mark.parametrize("reverse", [False, True])
def test_glow_tts_layers_agree_with_masks_of_any_length(make, reverse):
    layer = make()
    accelerated = copy.deepcopy(layer)
    assert len(gk.accelerate(accelerated).patched) == 1
    mask = (torch.arange(12) < torch.tensor([[12], [7], [1]])).unsqueeze(1).float()
    x = torch.randn(3, 8, 12) * mask
    with torch.no_grad():
        expected, actual = layer(x, mask, reverse=reverse), accelerated(x, mask, reverse=reverse)
    torch.testing.assert_close(actual[0], expected[0])
    if reverse:
        assert actual[1] is expected[1] is None
    else:
        torch.testing.assert_close(actual[1], expected[1], atol=1e-4, rtol=1e-5)


def test_inverse_that_glow_tts_has_stored_is_used():
    layer = audio.InvConvNear(8)
    gk.accelerate(layer)
    layer.weight_inv = torch.eye(4)
    x = torch.randn(1, 8, 5)
    own = audio.InvConvNear.forward(layer, x, reverse=True)[0]
    assert torch.equal(layer(x, reverse=True)[0], own)


def test_coupling_whose_scale_is_not_one_under_the_mask_is_left_alone():
    report = gk.accelerate(nn.ModuleList([audio.CouplingBlock(8, 6, sigmoid_scale=True)]))
    assert [row.reason for row in report.left_alone] == ["its scale is not one where the mask is zero"]
