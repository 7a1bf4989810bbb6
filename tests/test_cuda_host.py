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
KERNEL = "actnorm_statistics.cu"
SANITIZE = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"

# Prints what is wrong under every schedule.
ASK = """\
import os, sys, torch
sys.path.insert(0, sys.argv[1])
import glow_kernels as gk
for seed in range(4):
    os.environ["GLOW_KERNELS_SCHEDULE"] = str(seed)
    for shape in ((3, 5, 7, 11), (40, 300)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        try:
            with gk.use_backend("native"):
                mean, std = gk.actnorm_statistics(x)
        except RuntimeError as error:
            print(f"schedule {seed}: {error}")
            continue
        rest = [d for d in range(x.dim()) if d != 1]
        right = torch.allclose(mean, x.mean(rest), atol=1e-5) and torch.allclose(std, x.std(rest, correction=0))
        if not right:
            print(f"schedule {seed}: wrong")
print(torch.ops.glow_kernels.native_isa())
"""

SUM = ".add(all[thread + half * width]);\n"
BARRIER = "    __syncthreads();\n"

# What is replaced by what, and what must come out of it; an empty text stands for nothing wrong.
FAULTS = {
    "none": ("", "", ""),
    "no barrier after the first store": ("= mine;\n  __syncthreads();", "= mine;", "wrong"),
    "no barrier between two sums": (SUM + BARRIER, SUM, "wrong"),
    "a barrier that half of the threads miss": (SUM + BARRIER, f"{SUM}if (thread < 128){BARRIER}", "waits for ever"),
    "one sample too many": ("batch < planes.batches", "batch <= planes.batches", "heap-buffer-overflow"),
}


def libraries() -> str:
    """What a process must load first for the sanitizers."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    names = ("libasan.so", "libstdc++.so")
    found = (subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True) for name in names)
    return " ".join(each.stdout.strip() for each in found)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the package, of one kernel and of the shim."""
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
    correct = (REPOSITORY / "csrc" / "cuda" / KERNEL).read_text()
    right, wrong, expected = FAULTS[fault]
    assert not right or correct.count(right) == 1
    (tree / "csrc" / "cuda" / KERNEL).write_text(correct.replace(right, wrong) if right else correct)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GLOW_KERNELS_")}
    build = environment | {"GLOW_KERNELS_BUILD": "cuda-host", "CXXFLAGS": SANITIZE}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, env=build, check=True, capture_output=True)

    sanitized = environment | {"LD_PRELOAD": libraries(), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(tree)], cwd=tree, env=sanitized, capture_output=True, text=True
    )
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
