"""The operators: the functions that users call, with their mathematics, argument checks and autograd rules."""

from glow_kernels.ops.actnorm_conv1x1 import (
    actnorm_conv1x1,
    actnorm_conv1x1_inverse,
    actnorm_conv1x1_reversible_backward,
)
from glow_kernels.ops.actnorm_statistics import actnorm_statistics
from glow_kernels.ops.affine_coupling import (
    SCALE_MAPS,
    ScaleMap,
    additive_coupling,
    additive_coupling_inverse,
    affine_coupling,
    affine_coupling_inverse,
    affine_coupling_reversible_backward,
)
from glow_kernels.ops.bias_relu import bias_relu
from glow_kernels.ops.folding import lu_weight
from glow_kernels.ops.gaussian_log_prob import gaussian_log_prob, gaussian_sample, gaussian_standardize
from glow_kernels.ops.scale_filters import scale_filters

__all__ = [
    "SCALE_MAPS",
    "ScaleMap",
    "actnorm_conv1x1",
    "actnorm_conv1x1_inverse",
    "actnorm_conv1x1_reversible_backward",
    "actnorm_statistics",
    "additive_coupling",
    "additive_coupling_inverse",
    "affine_coupling",
    "affine_coupling_inverse",
    "affine_coupling_reversible_backward",
    "bias_relu",
    "gaussian_log_prob",
    "gaussian_sample",
    "gaussian_standardize",
    "lu_weight",
    "scale_filters",
]
