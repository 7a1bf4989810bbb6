"""The host shim finds what it is there for: faults are planted in copies of a kernel, which must come out.

A barrier taken away shows as a wrong result, a thread that misses one as an error with text, an access out of bounds as
AddressSanitizer's. The operator tests themselves run on the shim by ``make test-cuda-host``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SANITIZE = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"

# Prints what is wrong under every schedule with the samples of an operator.
ASK = """\
import os, sys, torch
sys.path.insert(0, sys.argv[1])
import glow_kernels as gk
torch.manual_seed(0)
{samples}
for seed in range(4):
    os.environ["GLOW_KERNELS_SCHEDULE"] = str(seed)
    for sample in samples:
        try:
            with gk.use_backend("native"):
                results = compute(*sample)
        except RuntimeError as error:
            print(f"schedule {{seed}}: {{error}}")
            continue
        with gk.use_backend("reference"):
            expected = compute(*sample)
        if not all(torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in zip(results, expected)):
            print(f"schedule {{seed}}: wrong")
print(torch.ops.glow_kernels.native_isa())
"""
# Lines that define samples and what is computed of each.
SAMPLES = {
    "actnorm_statistics": """\
compute = gk.actnorm_statistics
samples = [(torch.randn(shape),) for shape in ((3, 5, 7, 11), (40, 300))]
""",
    # In many tiles, with the kernels for small tensors and, of no multiprocessors, those for large ones.
    "coupling_conv1x1": """\
from glow_kernels.ops import coupling_conv1x1
def compute(multiprocessors, z, h, matrix, shift, grad, grad_log_det):
    os.environ["GLOW_KERNELS_MULTIPROCESSORS"] = multiprocessors
    options = "sigmoid", [1.0, 2.0, 1.0, 0.0, -1.0, 1.0], "interleaved_shift_scale", "shift_scale"
    results = coupling_conv1x1.forward(z, h, matrix, shift, *options)
    return *results, *coupling_conv1x1.backward(grad, grad_log_det, z, h, matrix, *options)
sizes = ((3, 6, 420), (3, 6, 420), (6, 6), (6,), (3, 6, 420), (3,))
samples = [(count, *map(torch.randn, sizes)) for count in "10"]
""",
    # The same, with an elimination in a block of its own and without.
    "actnorm_conv1x1": """\
import importlib
whole = importlib.import_module("glow_kernels.ops.actnorm_conv1x1")
def compute(multiprocessors, x, grad, grad_log_det, *parameters):
    os.environ["GLOW_KERNELS_MULTIPROCESSORS"] = multiprocessors
    return *whole._forward(x, *parameters), *whole._backward(grad, grad_log_det, x, *parameters, True)
def sample(multiprocessors, *known):
    data = torch.randn(3, 12, 420), torch.randn(3, 12, 420), torch.randn(3)
    return multiprocessors, *data, *torch.randn(2, 12), torch.linalg.qr(torch.randn(12, 12)).Q, *known
samples = [sample("1", None), sample("0", None), sample("0", torch.tensor(0.5))]
""",
}

# In which files the kernels of an operator are, faults among them.
SOURCES = {
    "actnorm_statistics": ("actnorm_statistics.cu",),
    "coupling_conv1x1": ("coupling_conv1x1.cu",),
    "actnorm_conv1x1": ("actnorm_conv1x1_step.cu", "actnorm_conv1x1_parameters.h", "actnorm_conv1x1.cu"),
}

SUM = ".add(all[thread + half * width]);\n"
BARRIER = "    __syncthreads();\n"

PRODUCT = "reader = Reader<H>(h, span);\n"
STORED = "write_tile(arguments.grad_z, work, span, dx);\n"

FOLDED = "reinterpret_cast<double*>(matrix + work.matrix_size()), matrix);\n"
LOADED = f"{FOLDED}  wait_for_copies();\n"

# The operator, what is replaced by what, and what must come out of it; an empty text stands for nothing wrong.
FAULTS = {
    "none": ("actnorm_statistics", "", "", ""),
    "no barrier after the first store": ("actnorm_statistics", "= mine;\n  __syncthreads();", "= mine;", "wrong"),
    "no barrier between two sums": ("actnorm_statistics", SUM + BARRIER, SUM, "wrong"),
    "a barrier that half of the threads miss": (
        *("actnorm_statistics", SUM + BARRIER, f"{SUM}if (thread < 128){BARRIER}"),
        "waits for ever",
    ),
    "one sample too many": (
        *("actnorm_statistics", "batch < planes.batches", "batch <= planes.batches"),
        "heap-buffer-overflow",
    ),
    "none in coupling and product": ("coupling_conv1x1", "", "", ""),
    "no barrier between product and coupling": ("coupling_conv1x1", PRODUCT + BARRIER, PRODUCT, "wrong"),
    "no barrier between coupling and sums": ("coupling_conv1x1", f"{BARRIER}    sums.add", "    sums.add", "wrong"),
    "no barrier between two tiles": ("coupling_conv1x1", STORED + BARRIER, STORED, "wrong"),
    "none in a linear map that folds": ("actnorm_conv1x1", "", "", ""),
    "no barrier between scales and folding": (
        "actnorm_conv1x1",
        "  __syncthreads();\n  for_each_row",
        "  for_each_row",
        "wrong",
    ),
    "no barrier between folding and product": ("actnorm_conv1x1", f"{LOADED}  __syncthreads();\n", LOADED, "wrong"),
    "a product before its tile is there": ("actnorm_conv1x1", LOADED, FOLDED, "wrong"),
    "folding before the weight is there": ("actnorm_conv1x1", "wait_for_copies<1>", "wait_for_copies<2>", "wrong"),
}


def libraries() -> str:
    """What a process must load first for the sanitizers."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    names = ("libasan.so", "libstdc++.so")
    found = (subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True) for name in names)
    return " ".join(each.stdout.strip() for each in found)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the package and of the shim, without kernels."""
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("shim")
    without = shutil.ignore_patterns("_C*", "__pycache__", "*.cu")
    for name in ("glow_kernels", "csrc", "tests/cuda_host"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=without)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_comes_out(tree, fault):
    operator, right, wrong, expected = FAULTS[fault]
    for earlier in (tree / "csrc" / "cuda").glob("*.cu"):
        earlier.unlink()
    correct = {
        path: (REPOSITORY / path).read_text() for path in (Path("csrc/cuda", name) for name in SOURCES[operator])
    }
    assert not right or sum(text.count(right) for text in correct.values()) == 1
    for path, text in correct.items():
        (tree / path).write_text(text.replace(right, wrong) if right else text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GLOW_KERNELS_")}
    build = environment | {"GLOW_KERNELS_BUILD": "cuda-host", "CXXFLAGS": SANITIZE}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, env=build, check=True, capture_output=True)

    sanitized = environment | {"LD_PRELOAD": libraries(), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    ask = [sys.executable, "-c", ASK.format(samples=SAMPLES[operator]), str(tree)]
    done = subprocess.run(ask, cwd=tree, env=sanitized, capture_output=True, text=True)
    said = done.stdout.splitlines()
    if not expected:
        assert said == ["cuda host shim"], done.stdout + done.stderr
    elif expected == "heap-buffer-overflow":
        assert done.returncode != 0
        assert expected in done.stderr
        assert "parts_kernel" in done.stderr
    else:
        assert expected in done.stdout
        assert said[-1] == "cuda host shim"
