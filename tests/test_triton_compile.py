"""Triton kernels compiled for GPUs that are not here, just as the operators launch them.

Proven for every target: nothing spills, every block fits, and the bandwidth shapes are read and written 128 bits at a
time. ``make kernels-report`` does the same for every type, option and shape.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ahead_of_time import TARGETS

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiled by the run without the interpreter"
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """A row of the report for every kernel of the core samples."""
    path = tmp_path_factory.mktemp("kernels") / "kernels.csv"
    script = Path(__file__).with_name("ahead_of_time.py")
    subprocess.run([sys.executable, str(script), "core", str(path)], check=True)
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills_and_every_block_fits(kernels, target):
    ours = [kernel for kernel in kernels if kernel["target"] == target]
    names = {kernel["operator"].split(maxsplit=1)[0] for kernel in ours}
    assert len(names) >= 20  # every function of every operator
    shared_memory = TARGETS[target][3]
    assert [kernel for kernel in ours if int(kernel["spills"])] == []
    assert [kernel for kernel in ours if int(kernel["shared_memory"]) > shared_memory] == []
    assert [kernel for kernel in ours if float(kernel["occupancy"]) == 0] == []


@pytest.mark.parametrize("target", TARGETS)
def test_bandwidth_shapes_are_read_and_written_128_bits_at_a_time(kernels, target):
    bandwidth = [
        kernel
        for kernel in kernels
        if kernel["target"] == target
        and ("x128x128 float32" in kernel["operator"] or "32x48x64x64 float32" in kernel["operator"])
        and kernel["kernel"] not in ("_sum_kernel", "_combine_kernel")
        # AMD's matrix units leave the results of a product in a layout of their own, which is stored as it is.
        and not (target == "gfx942" and "conv1x1" in kernel["operator"])
    ]
    assert len(bandwidth) >= 15
    assert [kernel for kernel in bandwidth if int(kernel["widest_load"]) < 128] == []
    # These two write nothing but partial results.
    reductions = ("_log_prob_kernel", "_chunk_kernel")
    writing = [
        kernel for kernel in bandwidth if kernel["kernel"] not in reductions and "no dx" not in kernel["operator"]
    ]
    assert [kernel for kernel in writing if int(kernel["widest_store"]) < 128] == []
