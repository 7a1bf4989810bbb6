"""Whole models, and the likelihood of images under them."""

from glow_kernels.models.glow import Glow
from glow_kernels.models.likelihood import bits_per_dim, dequantize, quantize

__all__ = ["Glow", "bits_per_dim", "dequantize", "quantize"]
