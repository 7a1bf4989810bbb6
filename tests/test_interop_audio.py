"""``accelerate`` on the layers of WaveGlow and Glow-TTS: sequences, masks, a convolution shared by channel groups."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dialects import audio
from torch import Tensor, nn

import glow_kernels as gk
from glow_kernels.bench.live_storages import LiveStorages
from glow_kernels.interop.copies import faithful_copy

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


def waveglow_batch(generator: torch.Generator | None = None, length: int = 128) -> tuple[Tensor, Tensor]:
    """A spectrogram and audio."""
    audio_batch = 0.1 * torch.randn(3, length, generator=generator).cumsum(1)
    return torch.randn(3, 5, length // 4, generator=generator), audio_batch


def decoder_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Negative log-likelihood per element that the mask keeps."""
    mask = (torch.arange(x.shape[2]) < torch.tensor([[12], [7], [5]])).unsqueeze(1).to(x.dtype)
    z, log_det = model(x * mask, mask)
    return ((0.5 * z.square()).sum() - log_det.sum()) / mask.sum()


def losses(model: nn.Module, loss, batches: list) -> list[float]:
    # At higher rates WaveGlow's loss jumps up now and then, and rounding errors grow with it.
    optimizer = torch.optim.SGD(model.parameters(), 3e-3, momentum=0.9)
    values = []
    for batch in batches:
        value = loss(model, *batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


class Halved(nn.Conv1d):
    def forward(self, x):
        return 0.5 * super().forward(x)


def test_replacing_the_convolution_inside_waveglows_layer_takes_effect():
    original, x = audio.Invertible1x1Conv(4), torch.randn(3, 4, 8)
    accelerated = copy.deepcopy(original)
    assert not gk.accelerate(accelerated, verify=False).left_alone
    for layer in (original, accelerated):
        weight = layer.conv.weight
        layer.conv = Halved(4, 4, 1, bias=False)
        layer.conv.weight = weight
    torch.testing.assert_close(accelerated(x), original(x))


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
@pytest.mark.parametrize("name", ["waveglow", "glow-tts"])
def test_a_training_run_has_the_same_losses(name, memory):
    generator = torch.Generator().manual_seed(0)
    models = []
    for _ in range(2):  # not a deep copy, which weight_norm refuses
        torch.manual_seed(0)
        models.append(audio.WaveGlow() if name == "waveglow" else audio.FlowDecoder())
    original, accelerated = models
    if name == "waveglow":
        loss = audio.waveglow_loss
        batches = [waveglow_batch(generator) for _ in range(40)]
    else:
        loss = decoder_loss
        batches = [(torch.randn(3, 8, 12, generator=generator),) for _ in range(40)]
    keys = list(accelerated.state_dict())
    report = gk.accelerate(accelerated, memory=memory)
    kinds = {row.kind for row in report.patched}
    if name == "waveglow":
        assert kinds == {"WaveGlow", "Invertible1x1Conv", *(() if memory == "store" else ("WN",))}
        assert "infer keeps its own couplings" in str(report)
    else:
        assert kinds == {"InvConvNear", "CouplingBlock"}
    assert {row.memory for row in report.patched if row.memory} <= {memory}
    assert list(accelerated.state_dict()) == keys
    expected, actual = (losses(model, loss, batches) for model in (original, accelerated))
    assert expected[-1] < expected[0]
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-4, atol=1e-6)


class BoundedWaveGlow(audio.WaveGlow):
    def couple(self, k, first, second, spect):
        b, log_s = self.WN[k]((first, spect)).chunk(2, 1)
        log_s = 2 * torch.tanh(log_s / 2)
        return torch.exp(log_s) * second + b, log_s


class OtherOrderWaveGlow(audio.WaveGlow):
    def couple(self, k, first, second, spect):
        log_s, b = self.WN[k]((first, spect)).chunk(2, 1)
        return torch.exp(log_s) * (second + b), log_s


class OtherConditionsWaveGlow(audio.WaveGlow):
    def conditions(self, spect):
        return super().conditions(spect).flip(1)


class UnevenWaveGlow(audio.WaveGlow):
    """Computes something else from its fifth step on."""

    def couple(self, k, first, second, spect):
        second, log_s = super().couple(k, first, second, spect)
        return (second, log_s) if k < 4 else (1.001 * second, log_s)


class TwoArguments(audio.WaveNet):
    def forward(self, audio, spect):
        return super().forward((audio, spect))


class SpreadWaveGlow(audio.WaveGlow):
    def __init__(self):
        super().__init__()
        for network in self.WN:
            network.__class__ = TwoArguments

    def couple(self, k, first, second, spect):
        b, log_s = self.WN[k](first, spect).chunk(2, 1)
        return torch.exp(log_s) * second + b, log_s


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (OtherOrderWaveGlow, "s = exp(u), chunk_scale_shift, shift_scale, net reads the first half"),
        (BoundedWaveGlow, "its log-scales are not what its networks return"),
        (OtherConditionsWaveGlow, "forward: result 0 differs by"),
        (UnevenWaveGlow, "forward: result 0 differs by"),
        (SpreadWaveGlow, "it does not run with chosen network outputs"),
    ],
)
def test_variants_of_waveglow_are_matched_exactly_or_not_patched(model, expected):
    torch.manual_seed(0)
    changed = model()
    batch = waveglow_batch()
    wanted = torch.autograd.grad(audio.waveglow_loss(changed, *batch), list(changed.parameters()))
    row = next(row for row in gk.accelerate(changed).layers if row.kind == "WaveGlow")
    assert (row.options if row.patched else row.reason).startswith(expected)
    actual = torch.autograd.grad(audio.waveglow_loss(changed, *batch), list(changed.parameters()))
    torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-5)


def test_waveglow_synthesises_and_raises_as_before_and_its_layers_are_still_called():
    torch.manual_seed(0)
    model = audio.WaveGlow()
    spectrogram, sound = waveglow_batch()
    expected, expected_log_s, expected_log_det = model((spectrogram, sound))
    torch.manual_seed(1)
    spoken = model.infer(spectrogram, 0.6)
    assert next(row for row in gk.accelerate(model).layers if row.kind == "WaveGlow").patched
    seen = []
    for name in ("upsample", "WN.3", "convinv.3"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    z, log_s, log_det = model((spectrogram, sound))
    assert seen == ["upsample", "convinv.3", "WN.3"]
    torch.testing.assert_close([z, *log_s, *log_det], [expected, *expected_log_s, *expected_log_det], atol=1e-4, rtol=0)
    torch.manual_seed(1)
    torch.testing.assert_close(model.infer(spectrogram, 0.6), spoken)
    with pytest.raises(AssertionError, match="the spectrogram is too short"):
        model((spectrogram[:, :, :4], sound))


def test_networks_that_take_other_arguments_are_not_recognised_as_waveglows():
    network = audio.WaveNet(2, 3, n_layers=1, n_channels=4)
    del network.cond_layer  # like RAD-TTS's, which concatenates data and conditions
    assert not gk.accelerate(network, memory="checkpoint").layers


def test_weights_of_networks_that_are_replaced_are_not_copied():
    # Computed weights, such as weight_norm's, are copied explicitly: for a whole WaveGlow, a GiB per comparison.
    model = audio.WaveGlow(width=32)
    model(waveglow_batch())
    with LiveStorages() as storages:
        copied = faithful_copy(model, {id(model.WN): nn.ModuleList()})
    assert not copied.WN
    assert storages.peak < sum(parameter.nbytes for parameter in model.WN.parameters()) / 4


def test_networks_of_waveglow_keep_no_activations():
    torch.manual_seed(0)
    model = audio.WaveGlow(n_layers=4, width=32)
    batch = waveglow_batch(length=4096)  # long enough for the weights that weight_norm computes not to matter
    kept = []
    for memory in ("store", "checkpoint"):
        gk.accelerate(model, memory=memory)
        with LiveStorages([model]) as storages:
            loss = audio.waveglow_loss(model, *batch)
            kept.append(storages.now)
        del loss
    assert kept[1] < kept[0] / 5


def test_stale_inverse_of_waveglow_is_not_reproduced():
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


@torch.no_grad()
def nearly_singular(weight: Tensor) -> None:
    """Give ``weight`` (C, C) or (C, C, 1) a condition number of 1e4 and a positive determinant."""
    left, right = torch.linalg.qr(torch.randn(2, len(weight), len(weight), dtype=torch.float64)).Q
    matrix = left * torch.logspace(2, -2, len(weight), dtype=torch.float64) @ right
    matrix[0] *= torch.linalg.det(matrix).sign()
    weight.copy_(matrix.view_as(weight))


def test_convolutions_that_are_nearly_singular_are_accelerated():
    # Random changes of W used to make the determinant negative, and an inverse in float32 is far off.
    for seed in range(4):
        torch.manual_seed(seed)
        layers = nn.ModuleList((audio.Invertible1x1Conv(8), audio.InvConvNear(16, 8)))
        nearly_singular(layers[0].conv.weight)
        nearly_singular(layers[1].weight)
        assert not gk.accelerate(layers).left_alone


class InverseWithGraph(audio.Invertible1x1Conv):
    def forward(self, z, reverse=False):
        return F.conv1d(z, self.conv.weight[:, :, 0].inverse()[:, :, None]) if reverse else super().forward(z)


@pytest.mark.parametrize("make", [audio.Invertible1x1Conv, InverseWithGraph])
def test_weights_of_waveglow_have_a_gradient_in_reverse_if_they_had_one(make):
    layer = make(4)
    (row,) = gk.accelerate(layer).layers
    assert row.patched, row.reason
    assert layer(torch.randn(2, 4, 8), reverse=True).requires_grad == (make is InverseWithGraph)


def test_log_determinant_of_waveglow_covers_the_batch_and_survives_a_negative_determinant():
    layer = audio.Invertible1x1Conv(8)
    z = torch.randn(2, 8, 10)
    expected = layer(z)[1]
    gk.accelerate(layer)
    torch.testing.assert_close(layer(z)[1], expected, atol=1e-5, rtol=0.0)
    with torch.no_grad():
        layer.conv.weight[0] *= -1
    torch.testing.assert_close(layer(z)[1], expected, atol=1e-5, rtol=0.0)


def two_way(layer):
    """``layer`` with a log-determinant in reverse too, as in NATSpeech and IMS-Toucan."""

    class TwoWay(layer):
        def forward(self, x, x_mask=None, reverse=False, **kwargs):
            z, log_det = super().forward(x, x_mask, reverse, **kwargs)
            return z, -super().forward(z, x_mask, **kwargs)[1] if reverse else log_det

    return TwoWay


class WithoutOption(audio.CouplingBlock):
    def __init__(self, in_channels):
        super().__init__(in_channels)
        del self.sigmoid_scale


CONVOLUTIONS = (audio.InvConvNear, audio.CoquiInvConvNear)
BLOCKS = (audio.CouplingBlock, WithoutOption, two_way(audio.CouplingBlock))


@pytest.mark.parametrize("make", [*CONVOLUTIONS, two_way(audio.InvConvNear), *BLOCKS])
@pytest.mark.parametrize("lengths", [[[12], [7], [1]], [[7]]], ids=["each", "one for all"])
@pytest.mark.parametrize("reverse", [False, True])
def test_glow_tts_layers_agree_with_masks_of_any_length(make, reverse, lengths):
    layer = make(8)
    accelerated = copy.deepcopy(layer)
    assert len(gk.accelerate(accelerated).patched) == 1
    mask = (torch.arange(12) < torch.tensor(lengths)).unsqueeze(1).float()
    x = torch.randn(3, 8, 12) * mask
    with torch.no_grad():
        expected, actual = layer(x, mask, reverse=reverse), accelerated(x, mask, reverse=reverse)
    torch.testing.assert_close(actual[0], expected[0])
    assert (expected[1] is None) == (reverse and make.__name__ != "TwoWay")
    if expected[1] is None:
        assert actual[1] is None
    else:
        torch.testing.assert_close(actual[1], expected[1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("make", CONVOLUTIONS)
def test_inverse_that_glow_tts_has_stored_is_used(make):
    layer = make(8)
    gk.accelerate(layer)
    layer.store_inverse()
    with torch.no_grad():
        layer.weight_inv.copy_(torch.eye(4))
    x = torch.randn(1, 8, 5)
    own = make.forward(layer, x, reverse=True)[0]
    assert torch.equal(layer(x, reverse=True)[0], own)


def test_normalised_weights_are_compared_in_their_own_dtype():
    coupling = audio.CouplingBlock(8, 6)
    nn.utils.weight_norm(coupling.start)
    (row,) = gk.accelerate(coupling.double()).layers
    assert row.patched, row.reason


def test_coupling_whose_scale_is_not_one_under_the_mask_is_not_patched():
    report = gk.accelerate(nn.ModuleList([audio.CouplingBlock(8, 6, sigmoid_scale=True)]))
    assert [row.reason for row in report.left_alone] == ["its scale is not one where the mask is zero"]


class SpeakerConvolution(audio.InvConvNear):
    """Adds a function of ``g``."""

    def __init__(self, channels):
        super().__init__(channels)
        self.speaker = nn.Conv1d(3, channels, 1)

    def forward(self, x, x_mask=None, reverse=False, **kwargs):
        z, log_det = super().forward(x, x_mask, reverse)
        return z if kwargs.get("g") is None else z + self.speaker(kwargs["g"]), log_det


class SpeakerNetwork(audio.WN):
    """Adds a function of ``g``."""

    def __init__(self, hidden):
        super().__init__(hidden)
        self.cond_layer = nn.Conv1d(3, hidden, 1)

    def forward(self, x, x_mask=None, g=None):
        return super().forward(x if g is None else x + self.cond_layer(g), x_mask)


class SpeakerCoupling(audio.CouplingBlock):
    """Adds ``g``, or the argument called ``name``, to its data."""

    def __init__(self, channels, name, network=audio.WN):
        super().__init__(channels, 6)
        self.name, self.wn = name, network(6)

    def forward(self, x, x_mask=None, reverse=False, g=None, **kwargs):
        given = {"g": g, **kwargs}.get(self.name)
        x = x if given is None else x + given.mean(1, keepdim=True)
        return super().forward(x, x_mask, reverse, g)


def networks_speaker(channels):
    coupling = audio.CouplingBlock(channels, 6)
    coupling.wn = SpeakerNetwork(6)
    return coupling


@pytest.mark.parametrize(
    ("make", "name", "patched"),
    [
        (audio.InvConvNear, "g", True),
        (SpeakerConvolution, "g", False),
        (networks_speaker, "g", True),
        (lambda channels: SpeakerCoupling(channels, "g"), "g", False),
        (lambda channels: SpeakerCoupling(channels, "g", SpeakerNetwork), "g", False),
        (lambda channels: SpeakerCoupling(channels, "pitch"), "pitch", True),
    ],
)
def test_glow_tts_layers_still_use_the_speaker(make, name, patched):
    layer = make(8).double()
    accelerated = copy.deepcopy(layer)
    (row,) = gk.accelerate(accelerated, memory="checkpoint").layers
    assert row.patched == patched, row.reason
    x, mask = torch.randn(2, 8, 5, dtype=torch.float64), torch.ones(2, 1, 5, dtype=torch.float64)
    given = torch.randn(2, 3, 1, dtype=torch.float64)
    results = []
    for each in (layer, accelerated):
        leaves = [x.clone().requires_grad_(), given.clone().requires_grad_(), *each.parameters()]
        z, log_det = each(leaves[0], mask, **{name: leaves[1]})
        loss = z.square().sum() - log_det.sum()
        results.append([loss, *torch.autograd.grad(loss, leaves, allow_unused=True)])
    torch.testing.assert_close(*results)
