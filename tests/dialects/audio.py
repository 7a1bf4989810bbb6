"""Layers with the conventions of NVIDIA/waveglow and jaywalnut310/glow-tts, written from them for the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Invertible1x1Conv(nn.Module):
    """WaveGlow: its log-determinant is that of the whole batch, and its inverse is computed once."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv1d(c, c, kernel_size=1, bias=False)
        weight = torch.linalg.qr(torch.randn(c, c)).Q
        weight[:, 0] *= torch.det(weight).sign()
        self.conv.weight.data = weight.view(c, c, 1)

    def forward(self, z, reverse=False):
        batch_size, _, n_of_groups = z.shape
        weight = self.conv.weight.squeeze(-1)
        if reverse:
            if not hasattr(self, "W_inverse"):
                self.W_inverse = weight.inverse()[..., None].detach()
            return F.conv1d(z, self.W_inverse)
        # NVIDIA's later copies compute it in float32, whatever the type of the weight.
        return self.conv(z), batch_size * n_of_groups * torch.logdet(weight.float())


class WaveNet(nn.Module):
    """WaveGlow's network: gated dilated convolutions with weight normalisation, conditioned on a spectrogram."""

    def __init__(self, n_in_channels, n_mel_channels, n_layers, n_channels, kernel_size=3):
        super().__init__()
        weight_norm = nn.utils.weight_norm
        self.n_layers, self.n_channels = n_layers, n_channels
        self.start = weight_norm(nn.Conv1d(n_in_channels, n_channels, 1))
        self.end = nn.Conv1d(n_channels, 2 * n_in_channels, 1)
        nn.init.normal_(self.end.weight, 0, 0.05)
        nn.init.zeros_(self.end.bias)
        self.cond_layer = weight_norm(nn.Conv1d(n_mel_channels, 2 * n_channels * n_layers, 1))
        self.in_layers, self.res_skip_layers = nn.ModuleList(), nn.ModuleList()
        for i in range(n_layers):
            padding = (kernel_size - 1) * 2**i // 2
            conv = nn.Conv1d(n_channels, 2 * n_channels, kernel_size, dilation=2**i, padding=padding)
            self.in_layers.append(weight_norm(conv))
            outputs = 2 * n_channels if i < n_layers - 1 else n_channels
            self.res_skip_layers.append(weight_norm(nn.Conv1d(n_channels, outputs, 1)))

    def forward(self, forward_input):
        audio, spect = forward_input
        audio, output = self.start(audio), 0
        conditions = self.cond_layer(spect).chunk(self.n_layers, 1)
        for i, condition in enumerate(conditions):
            one, other = (self.in_layers[i](audio) + condition).chunk(2, 1)
            acts = self.res_skip_layers[i](torch.tanh(one) * torch.sigmoid(other))
            if i < self.n_layers - 1:
                audio = audio + acts[:, : self.n_channels]
                acts = acts[:, self.n_channels :]
            output = output + acts
        return self.end(output)


class WaveGlow(nn.Module):
    """Its couplings are written out in ``forward``; some channels are output early."""

    def __init__(self, n_mel_channels=5, n_flows=6, n_group=8, n_early_every=4, n_early_size=2, n_layers=2, width=8):
        super().__init__()
        self.upsample = nn.ConvTranspose1d(n_mel_channels, n_mel_channels, 8, stride=4)
        self.n_flows, self.n_group = n_flows, n_group
        self.n_early_every, self.n_early_size = n_early_every, n_early_size
        self.WN, self.convinv = nn.ModuleList(), nn.ModuleList()
        channels = n_group
        for k in range(n_flows):
            channels -= n_early_size if k % n_early_every == 0 and k > 0 else 0
            self.convinv.append(Invertible1x1Conv(channels))
            self.WN.append(WaveNet(channels // 2, n_mel_channels * n_group, n_layers, width))

    def conditions(self, spect):
        return spect.unfold(2, self.n_group, self.n_group).permute(0, 1, 3, 2).flatten(1, 2)

    def couple(self, k, first, second, spect):
        b, log_s = self.WN[k]((first, spect)).chunk(2, 1)
        return torch.exp(log_s) * second + b, log_s

    def forward(self, forward_input):
        spect, audio = forward_input
        spect = self.upsample(spect)
        assert spect.shape[2] >= audio.shape[1], "the spectrogram is too short"
        spect = self.conditions(spect[:, :, : audio.shape[1]])
        audio = audio.unfold(1, self.n_group, self.n_group).permute(0, 2, 1)
        outputs, log_s_list, log_det_list = [], [], []
        for k in range(self.n_flows):
            if k % self.n_early_every == 0 and k > 0:
                outputs.append(audio[:, : self.n_early_size])
                audio = audio[:, self.n_early_size :]
            audio, log_det = self.convinv[k](audio)
            first, second = audio.chunk(2, 1)
            second, log_s = self.couple(k, first, second, spect)
            audio = torch.cat([first, second], 1)
            log_s_list.append(log_s)
            log_det_list.append(log_det)
        return torch.cat([*outputs, audio], 1), log_s_list, log_det_list

    def infer(self, spect, sigma=1.0):
        spect = self.conditions(self.upsample(spect)[:, :, : -self.upsample.kernel_size[0] + self.upsample.stride[0]])
        channels = self.convinv[-1].conv.in_channels
        audio = sigma * torch.randn(len(spect), channels, spect.shape[2])
        for k in reversed(range(self.n_flows)):
            first, second = audio.chunk(2, 1)
            b, log_s = self.WN[k]((first, spect)).chunk(2, 1)
            audio = self.convinv[k](torch.cat([first, (second - b) / torch.exp(log_s)], 1), reverse=True)
            if k % self.n_early_every == 0 and k > 0:
                audio = torch.cat([sigma * torch.randn(len(spect), self.n_early_size, spect.shape[2]), audio], 1)
        return audio.permute(0, 2, 1).flatten(1)


def waveglow_loss(model, spect, audio):
    """Loss per element of the audio, as in training."""
    z, log_s_list, log_det_list = model((spect, audio))
    log_s_total = sum(log_s.sum() for log_s in log_s_list)
    return (z.square().sum() / 2 - log_s_total - sum(log_det_list)) / z.numel()


class InvConvNear(nn.Module):
    """Glow-TTS: one small matrix for all groups of channels."""

    def __init__(self, channels, n_split=4):
        super().__init__()
        self.channels, self.n_split = channels, n_split
        weight = torch.linalg.qr(torch.randn(n_split, n_split)).Q
        weight[:, 0] *= torch.det(weight).sign()
        self.weight = nn.Parameter(weight)

    def forward(self, x, x_mask=None, reverse=False, **kwargs):
        (b, c, t), n = x.size(), len(self.weight)
        length = torch.ones(b, dtype=x.dtype) * t if x_mask is None else x_mask.sum([1, 2])
        x_mask = 1 if x_mask is None else x_mask
        x = x.view(b, 2, c // n, n // 2, t).permute(0, 1, 3, 2, 4)
        x = x.contiguous().view(b, n, c // n, t)
        weight = self.weight_inverse() if reverse else self.weight
        logdet = None if reverse else torch.logdet(self.weight) * (c / n) * length
        z = F.conv2d(x, weight[:, :, None, None])
        z = z.view(b, 2, n // 2, c // n, t).permute(0, 1, 3, 2, 4)
        return z.contiguous().view(b, c, t) * x_mask, logdet

    def weight_inverse(self):
        if getattr(self, "weight_inv", None) is not None:
            return self.weight_inv
        return self.weight.float().inverse().to(self.weight.dtype)

    def store_inverse(self):
        inverse = self.weight_inverse()
        self.weight_inv = nn.Parameter(inverse, requires_grad=False) if hasattr(self, "weight_inv") else inverse


class CoquiInvConvNear(InvConvNear):
    """Glow-TTS in coqui: another attribute name, and a ``weight_inv`` from the beginning."""

    def __init__(self, channels):
        super().__init__(channels)
        self.num_splits, self.weight_inv = self.n_split, None
        del self.n_split


class WN(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.layer = nn.Conv1d(hidden, hidden, 3, padding=1)

    def forward(self, x, x_mask=None, g=None):
        return torch.tanh(self.layer(x)) * x_mask


class ActNorm(nn.Module):
    """Glow-TTS, initialised."""

    def __init__(self, channels):
        super().__init__()
        self.logs = nn.Parameter(torch.zeros(1, channels, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, x, x_mask, reverse=False, **kwargs):
        if reverse:
            return (x - self.bias) * torch.exp(-self.logs) * x_mask, None
        return (self.bias + torch.exp(self.logs) * x) * x_mask, self.logs.sum() * x_mask.sum([1, 2])


class FlowDecoder(nn.Module):
    """Glow-TTS: steps of ActNorm, convolution and coupling."""

    def __init__(self, channels=8, hidden=6, n_blocks=3):
        super().__init__()
        self.flows = nn.ModuleList()
        for _ in range(n_blocks):
            self.flows.extend([ActNorm(channels), InvConvNear(channels), CouplingBlock(channels, hidden)])

    def forward(self, x, x_mask):
        total = 0
        for flow in self.flows:
            x, log_det = flow(x, x_mask)
            total = total + log_det
        return x, total


class CouplingBlock(nn.Module):
    """Glow-TTS."""

    def __init__(self, in_channels, hidden=6, sigmoid_scale=False):
        super().__init__()
        self.sigmoid_scale = sigmoid_scale
        self.start = nn.Conv1d(in_channels // 2, hidden, 1)
        self.wn = WN(hidden)
        self.end = nn.Conv1d(hidden, in_channels, 1)

    def forward(self, x, x_mask=None, reverse=False, g=None, **kwargs):
        x_mask = 1 if x_mask is None else x_mask
        x_0, x_1 = x.chunk(2, 1)
        out = self.end(self.wn(self.start(x_0) * x_mask, x_mask, g))
        m, logs = out.chunk(2, 1)
        if getattr(self, "sigmoid_scale", False):  # some copies do not have the option
            logs = torch.log(1e-6 + torch.sigmoid(logs + 2))
        if reverse:
            return torch.cat([x_0, (x_1 - m) * torch.exp(-logs) * x_mask], 1), None
        z_1 = (m + torch.exp(logs) * x_1) * x_mask
        return torch.cat([x_0, z_1], 1), torch.sum(logs * x_mask, [1, 2])
