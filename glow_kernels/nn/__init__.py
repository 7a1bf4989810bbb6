"""Layers of a normalizing flow: ``forward(x) -> (z, log_det)`` and ``inverse(z) -> (x, log_det)``."""

from glow_kernels.nn.actnorm import ActNorm
from glow_kernels.nn.conv1x1 import ChannelPermutation, InvertibleConv1x1
from glow_kernels.nn.coupling import AdditiveCoupling, AffineCoupling
from glow_kernels.nn.network import CouplingNetwork, ZeroConv2d
from glow_kernels.nn.split import SplitPrior, TopPrior
from glow_kernels.nn.squeeze import Squeeze
from glow_kernels.nn.step import FlowStep

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "ChannelPermutation",
    "CouplingNetwork",
    "FlowStep",
    "InvertibleConv1x1",
    "SplitPrior",
    "Squeeze",
    "TopPrior",
    "ZeroConv2d",
]
