"""The ``state_dict`` of a Glow in each dialect: read into ``Weights`` and written from them."""

from __future__ import annotations

from glow_kernels.interop.state_dicts.common import Dialect
from glow_kernels.interop.state_dicts.normflows import Normflows
from glow_kernels.interop.state_dicts.openai import OpenAI
from glow_kernels.interop.state_dicts.ours import Ours
from glow_kernels.interop.state_dicts.rosinality import Rosinality
from glow_kernels.interop.state_dicts.tensorflow import TensorFlow

DIALECTS: dict[str, Dialect] = {
    "glow_kernels": Ours(),
    "openai": TensorFlow(),
    "rosinality": Rosinality(),
    "chaiyujin": OpenAI("f", "", ("l", "u"), "learn_top"),
    "y0ast": OpenAI("block", "conv.", ("lower", "upper"), "learn_top_fn"),
    "normflows": Normflows(),
}
