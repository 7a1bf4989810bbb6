"""The CUDA library as nvcc makes it, for GPUs that are not here: every warning is an error, nothing spills.

``make kernels-report`` writes what every kernel needs into reports/cuda_kernels.csv.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ahead_of_time import nvidia_tool
from cuda_resources import LIBRARY, kernels

REPOSITORY = Path(__file__).parents[1]
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@pytest.fixture(scope="module")
def built():
    """All kernels of the library as the sources are now; building takes minutes where nothing is there yet."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = {**os.environ, "GLOW_KERNELS_BUILD": "cuda"}
    environment.pop("GLOW_KERNELS_CUDA_ARCHS", None)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if ": no nvcc" in done.stderr or "is too old; install the CUDA toolkit" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    return kernels()


@pytest.mark.parametrize("target", ARCHS)
def test_nothing_is_in_local_memory_and_every_block_fits(built, target):
    ours = [kernel for kernel in built if kernel.target == target]
    assert len(ours) >= 40
    assert [kernel for kernel in ours if kernel.stack or kernel.local] == []
    assert [kernel for kernel in ours if kernel.occupancy == 0] == []


def test_every_target_has_the_same_kernels(built):
    names = [sorted(kernel.kernel for kernel in built if kernel.target == target) for target in ARCHS]
    assert all(ours == names[0] for ours in names)


def test_later_gpus_have_intermediate_code_of_the_newest_generation(built):
    assert set(re.findall(r"\.(sm_\d+)\.ptx", nvidia_tool("cuobjdump", "--list-ptx", str(LIBRARY)))) == {"sm_100"}
