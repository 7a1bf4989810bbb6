"""csrc/include/glow_kernels/math.h on the CPU: every elementary function is within 2 ulp in every instruction set."""

from __future__ import annotations

import ctypes
import functools
import os
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import setuptools
import torch

REPOSITORY = Path(__file__).parents[1]
FUNCTIONS = {
    "exponential": np.exp,
    "logarithm": np.log,
    "log1p_of_fraction": np.log1p,
    "hyperbolic_tangent": np.tanh,
    "arc_tangent": np.arctan,
}
DTYPES = {"float": np.float32, "double": np.float64}
PROBE = """\
#include "glow_kernels/math.h"
#define PROBE(function, type)                                                                        \\
  extern "C" __attribute__((visibility("default"))) void function##_##type(const type* x, type* y, int64_t count) { \\
    _Pragma("omp simd") for (int64_t i = 0; i < count; ++i) y[i] = glow_kernels::function(x[i]);     \\
  }
"""
CAPABILITIES = {"AVX512": 2, "AVX2": 1}


@pytest.fixture(scope="module", params=["baseline", "avx2", "avx512"])
def library(request, tmp_path_factory):
    """The functions for arrays, compiled like the kernels for an instruction set."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        pytest.skip("needs a C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        build = runpy.run_path(str(REPOSITORY / "setup.py"))
    runs = list(build["ISAS"])[: CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), 0) + 1]
    if request.param not in runs:
        pytest.skip(f"this processor has no {request.param}")
    source = tmp_path_factory.mktemp(request.param) / "probe.cpp"
    source.write_text(PROBE + "".join(f"PROBE({name}, {type_})\n" for name in FUNCTIONS for type_ in DTYPES))
    flags = [*build["COMPILE"].split(), *build["ISAS"][request.param].split(), "-Werror", "-shared"]
    path = source.with_suffix(".so")
    subprocess.run([*compiler, *flags, str(source), "-o", str(path)], cwd=REPOSITORY, check=True)
    return ctypes.CDLL(str(path))


@functools.cache
def arguments_and_truth(name, type_):
    """Dense arguments, those where the range reduction switches, and special values; and the truth in long double."""
    dtype, count = DTYPES[type_], 1 << 15
    limits, random = np.finfo(dtype), np.random.default_rng(0)
    low, high = np.log(float(limits.tiny)), np.log(float(limits.max))
    special = [0.0, 1.0, limits.tiny, np.inf, np.nan]
    any_size = np.exp(random.uniform(low, high, count))
    near = 1 + 1e-6 * random.standard_normal(count)
    if name == "exponential":
        special += [-0.0, limits.max, -limits.max, -np.inf, limits.smallest_subnormal]
        switches = np.arange(int(low * 3), int(high * 3)) * np.log(2) / 2
        parts = [random.uniform(1.07 * low, 1.02 * high, count), np.exp(random.uniform(low, 0, count)), switches]
        parts += [-parts[1], np.nextafter(switches, 0)]
    elif name == "logarithm":
        special[0] = limits.max
        parts = [any_size, random.uniform(0.4, 2.1, count), near, np.sqrt(0.5) * near]
    elif name == "log1p_of_fraction":
        special[3] = limits.smallest_subnormal
        parts = [random.uniform(0, 1, count), np.exp(random.uniform(low, 0, count)), 0.41421356 * near]
    else:
        special += [limits.max, limits.smallest_subnormal]
        parts = [any_size, random.uniform(0, 3, count), random.uniform(0, 30, count), near, 0.625 * near]
        parts += [-part for part in (*parts, np.array(special))]
    x = np.concatenate([np.array(special), *parts]).astype(dtype)
    with np.errstate(all="ignore"):
        return x, FUNCTIONS[name](x.astype(np.longdouble))


@pytest.mark.parametrize("type_", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions_are_within_two_ulps(library, name, type_):
    x, truth = arguments_and_truth(name, type_)
    result, limits = np.empty_like(x), np.finfo(x.dtype)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (x, result))
    library[f"{name}_{type_}"](*pointers, ctypes.c_int64(x.size))

    with np.errstate(all="ignore"):
        # Subnormal results, infinity and NaN must be the rounded truth.
        same = (result == truth.astype(x.dtype)) | (np.isnan(result) & np.isnan(truth))
        exponents = np.floor(np.log2(np.maximum(np.abs(truth), limits.tiny)))
        ulps = np.abs(result - truth) / np.exp2(exponents - limits.nmant)
        wrong = ~(same | (ulps <= 2))
    assert not wrong.any(), (x[wrong][:5], result[wrong][:5], truth[wrong][:5])
