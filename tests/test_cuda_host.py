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
    # Of contiguous data with an h that lies channels last, in tiles that end among the positions of a thread.
    "affine_coupling": """\
from glow_kernels.ops.affine_coupling import forward, reversible_backward
os.environ["GLOW_KERNELS_MULTIPROCESSORS"] = "0"
def compute(y, h, grad, grad_log_det):
    options = None, "sigmoid", [1.0, 2.0, 1.0, 0.0, -1.0, 1.0], "chunk_scale_shift", "shift_scale"
    results = forward(y, h, *options)
    return *results, *reversible_backward(grad, grad_log_det, y, h, *options)[:3]
def sample(*sizes):
    y, h, grad = torch.randn(sizes), torch.randn(sizes[0], 2 * sizes[1], *sizes[2:]), torch.randn(sizes)
    return y, h.to(memory_format=torch.channels_last), grad, torch.randn(sizes[0])
samples = [sample(2, 6, 19, 11), sample(2, 40, 7, 5)]
""",
}

SUM = ".add(all[thread + half * width]);\n"
BARRIER = "    __syncthreads();\n"

PRODUCT = "reader = Reader<H>(h, span);\n"
STORED = "write_tile(arguments.grad_z, work, span, dx);\n"

BROUGHT = "  bring(exchange, h, tile, pairs);\n"
SPOT = "const auto raw_data = fetch<N>(views.data, tile, spot);\n"
GIVEN = "// nobody else reads this pair before the barrier\n  }\n"

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
    "none in a coupling with pairs to exchange": ("affine_coupling", "", "", ""),
    "positions beyond the tensor count": (
        *("affine_coupling", "if (i < spot.count) total += log_factor;", "total += log_factor;"),
        "wrong",
    ),
    "no barrier before pairs are read": (
        *("affine_coupling", f"{SPOT}{BROUGHT}  __syncthreads();\n", f"{SPOT}{BROUGHT}"),
        "wrong",
    ),
    "no barrier before their gradients are written": (
        *("affine_coupling", f"{GIVEN}  __syncthreads();\n", GIVEN),
        "wrong",
    ),
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
    kernel = Path("csrc") / "cuda" / f"{operator}.cu"
    correct = (REPOSITORY / kernel).read_text()
    assert not right or correct.count(right) == 1
    (tree / kernel).write_text(correct.replace(right, wrong) if right else correct)
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
