"""The loss that training minimises."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glow_kernels.models import Glow
from glow_kernels.training.config import TrainingConfig


class Objective(nn.Module):
    """Bits per dimension, plus the classification loss if there are labels, as one module for DDP or FSDP to wrap.

    Args:
        model: the model.
        config: supplies the precision and the weight of the classification loss.
    """

    def __init__(self, model: Glow, config: TrainingConfig) -> None:
        super().__init__()
        self.model = model
        self.lower_precision = config.precision == "bfloat16"
        self.class_weight = config.class_weight

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Means over the batch ``x`` (B, C, H, W): the loss, and bits per dimension, detached."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.lower_precision):
            if labels is None:
                bits = self.model.bits_per_dim(x).mean()
                return bits, bits.detach()
            log_prob, logits = self.model.log_prob_and_logits(x, labels)
        bits = self.model.to_bits_per_dim(log_prob).mean()
        cross_entropy_bits = F.cross_entropy(logits.float(), labels) / math.log(2.0)
        return bits + self.class_weight * cross_entropy_bits, bits.detach()
