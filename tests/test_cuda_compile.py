"""The CUDA library as nvcc compiles it, for GPUs that are not here: every warning is an error, nothing spills.

``make kernels-report`` writes the resource usage of every kernel to reports/cuda_kernels.csv, and a summary for all
GPUs with the hash of the sources to tests/cuda_kernels.csv. While the sources match, the tests compile for one GPU
instead of six, and compare the result with the record.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from ahead_of_time import nvidia_tool
from cuda_resources import ARCHS, LIBRARY, REPOSITORY, kernels, recorded, summary

RECORDED = {row["target"]: row for row in recorded()}
COMPILED = ("sm_90",) if set(RECORDED) == set(ARCHS) else ARCHS


@pytest.fixture(scope="module")
def built():
    """The kernels of the library for the current sources; building from scratch takes minutes."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    archs = ",".join(arch.removeprefix("sm_") for arch in COMPILED)
    environment = {**os.environ, "GLOW_KERNELS_BUILD": "cuda", "GLOW_KERNELS_CUDA_ARCHS": archs}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if ": no nvcc" in done.stderr or "is too old; install the CUDA toolkit" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    return kernels()


@pytest.mark.parametrize("target", COMPILED)
def test_nothing_is_in_local_memory_and_every_block_fits(built, target):
    ours = [kernel for kernel in built if kernel.target == target]
    assert len(ours) >= 40
    assert [kernel for kernel in ours if kernel.stack or kernel.local] == []
    assert [kernel for kernel in ours if kernel.occupancy == 0] == []


def test_every_target_has_the_same_kernels(built):
    names = [sorted(kernel.kernel for kernel in built if kernel.target == target) for target in COMPILED]
    assert all(ours == names[0] for ours in names)


def test_kernels_are_as_recorded(built):
    for row in summary(built):
        record = RECORDED.get(row["target"], row)
        if record["nvcc"] == row["nvcc"]:
            assert row == record


@pytest.mark.parametrize("target", RECORDED)
def test_no_kernel_uses_local_memory(target):
    assert (RECORDED[target]["stack"], RECORDED[target]["local"]) == ("0", "0")


def test_later_gpus_have_intermediate_code_of_the_newest_generation(built):
    if len(COMPILED) < len(ARCHS):
        pytest.skip("only in a library for all GPUs")
    assert set(re.findall(r"\.(sm_\d+)\.ptx", nvidia_tool("cuobjdump", "--list-ptx", str(LIBRARY)))) == {"sm_100"}
