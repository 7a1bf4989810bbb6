"""ActNorm: an affine map per channel whose parameters start from the statistics of the first batch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glow_kernels.backends.numerics import compute_dtype
from glow_kernels.ops._checks import check_channels, check_number, check_whole, is_readable, positions
from glow_kernels.ops.actnorm_statistics import actnorm_statistics


class ActNorm(nn.Module):
    """``z = exp(log_scale) * (x + bias)`` per channel (Kingma and Dhariwal, "Glow", 2018, section 3.1).

    The first forward in training mode sets ``bias`` and ``log_scale`` so that every channel of that batch, over all
    ranks, gets mean 0 and standard deviation 1. Whether this has happened is saved with the weights.

    Args:
        channels: C.
        eps: added to the standard deviation at initialisation, so that a constant channel gets a finite scale.

    Raises:
        TypeError, ValueError: ``channels`` is not a whole number of at least 1, or ``eps`` not a finite number of at
            least 0.
    """

    initialized: Tensor

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        check_whole("channels", channels, 1)
        check_number("eps", eps)
        if not 0.0 <= eps < math.inf:
            raise ValueError(f"eps must be finite and at least 0, got {eps}")
        self.channels = channels
        self.eps = eps
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        # Mirror of the buffer: reading a tensor would wait for the device and break compiled graphs.
        self._is_initialized = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` (B, C, *spatial) to ``z`` and ``log_det`` (B,).

        Raises:
            RuntimeError: not initialised, and not in training mode.
        """
        check_channels("x", x, self.channels)
        self.prepare(x)
        wide = x.to(compute_dtype(x))
        z = (wide + self._per_channel(self.bias, wide)) * self._per_channel(self.log_scale.exp(), wide)
        return z.to(x.dtype), self._log_det(x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` (B, C, *spatial) to ``x`` and ``log_det`` (B,) of the inverse map.

        Raises:
            RuntimeError: not initialised.
        """
        check_channels("z", z, self.channels)
        self.require_initialized()
        wide = z.to(compute_dtype(z))
        x = wide * self._per_channel((-self.log_scale).exp(), wide) - self._per_channel(self.bias, wide)
        return x.to(z.dtype), -self._log_det(z)

    def prepare(self, x: Tensor) -> None:
        """In training mode, initialise from ``x`` (B, C, *spatial) unless that has already happened.

        Raises:
            RuntimeError: not initialised, and not in training mode, or in ``torch.export``.
        """
        if self.is_initialized():
            return
        # An exported program would initialise at every call, since it discards writes to parameters. Before PyTorch
        # 2.12 torch.compiler.is_exporting() is also true under torch.compile.
        if not self.training or torch.compiler._is_exporting_flag:
            self.require_initialized()
        self.initialize(x)

    def is_initialized(self) -> bool:
        """Whether the parameters have been set: initialised from data, or loaded along with the buffer."""
        if self._is_initialized:
            return True
        # The mirror does not notice if the buffer is written or replaced from outside, as averaged models and
        # functional_call do. The parameters that came with such a buffer must not be overwritten.
        return is_readable(self.initialized) and bool(self.initialized)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the parameters from the statistics of ``x`` (B, C, *spatial), even if they have been set before.

        Raises:
            ValueError: ``x`` is not finite; the parameters are not changed.
            RuntimeError: the parameters are sharded by FSDP, or belong to a replica of DataParallel.
        """
        check_channels("x", x, self.channels)
        if getattr(self, "_is_replica", False) or _is_sharded(self):
            raise RuntimeError(
                f"ActNorm of {self.channels} channels cannot be initialised under DataParallel or FSDP, which discard "
                "what a forward writes: call model.initialize(batch), or load weights, before it is wrapped or sharded"
            )
        mean, std = actnorm_statistics(x)
        if is_readable(std) and not bool(std.isfinite().all()):
            channels = int(std.isfinite().logical_not().sum())
            raise ValueError(
                "x must be finite to initialise ActNorm, "
                f"got a standard deviation that is not finite in {channels} of {self.channels} channels"
            )
        self.bias.copy_(-mean)
        self.log_scale.copy_(-(std + self.eps).log())
        self.initialized.fill_(True)
        self._is_initialized = True

    def require_initialized(self) -> None:
        """Raise a RuntimeError that names the remedy unless the parameters have been set."""
        if not self.is_initialized():
            raise RuntimeError(
                f"ActNorm of {self.channels} channels is not initialised: run one forward in training mode, "
                "or model.initialize(batch), or load weights, before evaluating, inverting, sampling or exporting"
            )

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"

    def _log_det(self, x: Tensor) -> Tensor:
        return self.log_scale.to(compute_dtype(x)).sum().expand(x.shape[0]) * positions(x)

    @staticmethod
    def _per_channel(values: Tensor, like: Tensor) -> Tensor:
        return values.to(like.dtype).view(-1, *(1,) * (like.dim() - 2))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # Read the buffer, not the state dict: what that holds may have the wrong shape (which PyTorch reports) or no
        # values.
        if is_readable(self.initialized):
            self._is_initialized = bool(self.initialized)


def _is_sharded(module: nn.Module) -> bool:
    """Whether FSDP manages ``module`` or one around it: in forward its parameters are copies that are discarded."""
    # FSDP1 and fully_shard both set this flag for torch.compile. replicate(), which builds on the latter, does not.
    if getattr(module, "_is_fsdp_managed_module", False):
        return True
    if torch.compiler.is_compiling() or not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    units = [unit for unit in list(_module_state_mapping) if isinstance(unit, FSDPModule)]
    return any(part is module for unit in units for part in unit.modules())
