"""The CUDA library as nvcc makes it, for GPUs that are not here: every warning is an error, nothing spills.

``make kernels-report`` writes what every kernel needs into reports/cuda_kernels.csv, and into tests/cuda_kernels.csv of
which sources that is true for all GPUs. As long as those are the sources, a third of the operators is compiled here for
one GPU, another third every day, and must need no more than is recorded.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from ahead_of_time import nvidia_tool
from cuda_resources import ARCHS, LIBRARY, REPOSITORY, kernels, recorded
from operators import MODULES

RECORDED = {row["target"]: row for row in recorded()}
IS_RECORDED = set(RECORDED) == set(ARCHS)
COMPILED = ("sm_90",) if IS_RECORDED else ARCHS


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The repository, or as much of it as a third of the operators needs."""
    if not IS_RECORDED:
        return REPOSITORY
    folder = tmp_path_factory.mktemp("third")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    shutil.copytree(REPOSITORY / "csrc", folder / "csrc")
    (folder / "glow_kernels").mkdir()
    objects = REPOSITORY / "build"  # with those of make build among them
    objects.mkdir(exist_ok=True)
    (folder / "build").symlink_to(objects)
    # Whole operators, since the files of one call each other.
    chosen = tuple(MODULES[datetime.date.today().toordinal() % 3 :: 3])
    for source in (folder / "csrc" / "cuda").glob("*.cu"):
        if not source.name.startswith(chosen):
            source.unlink()
    return folder


@pytest.fixture(scope="module")
def built(tree):
    """The kernels of the library as the sources are now; building takes minutes where nothing is there yet."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    archs = ",".join(arch.removeprefix("sm_") for arch in COMPILED)
    environment = {**os.environ, "GLOW_KERNELS_BUILD": "cuda", "GLOW_KERNELS_CUDA_ARCHS": archs}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if ": no nvcc" in done.stderr or "is too old; install the CUDA toolkit" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    return kernels(tree / LIBRARY.relative_to(REPOSITORY))


@pytest.mark.parametrize("target", COMPILED)
def test_nothing_is_in_local_memory_and_every_block_fits(built, target):
    ours = [kernel for kernel in built if kernel.target == target]
    assert len(ours) >= 10
    assert [kernel for kernel in ours if kernel.stack or kernel.local] == []
    assert [kernel for kernel in ours if kernel.occupancy == 0] == []


def test_every_target_has_the_same_kernels(built):
    names = [sorted(kernel.kernel for kernel in built if kernel.target == target) for target in COMPILED]
    assert all(ours == names[0] for ours in names)


@pytest.mark.skipif(not IS_RECORDED, reason="nothing is recorded of these sources: run make kernels-report")
def test_kernels_need_no_more_than_is_recorded(tree, built):
    description = json.loads((tree / LIBRARY.relative_to(REPOSITORY)).with_suffix(".json").read_text())
    for kernel in built:
        most = RECORDED[kernel.target]
        assert most["nvcc"] != description["nvcc"] or kernel.registers <= int(most["registers"]), kernel


@pytest.mark.parametrize("target", RECORDED)
def test_of_no_target_uses_a_kernel_local_memory(target):
    assert (RECORDED[target]["stack"], RECORDED[target]["local"]) == ("0", "0")


def test_later_gpus_have_intermediate_code_of_the_newest_generation(built):
    if len(COMPILED) < len(ARCHS):
        pytest.skip("only in a library for all GPUs")
    assert set(re.findall(r"\.(sm_\d+)\.ptx", nvidia_tool("cuobjdump", "--list-ptx", str(LIBRARY)))) == {"sm_100"}
