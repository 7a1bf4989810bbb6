"""The host shim detects the faults that it is for: they are planted in copies of the kernels and must be found.

A barrier taken away shows as a wrong result, a thread that misses one and a copy that is not aligned as errors with
text, an access out of bounds as AddressSanitizer's. One library has all faults of an operator, and an environment
variable chooses one. The product that stands in for the tensor cores is held against their documentation. The operator
tests themselves run on the shim by ``make test-cuda-host``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]
# Takes half as long to compile as the options of make test-cuda-host; UBSan is not needed for these faults.
SANITIZE = "-O0 -g1 -fsanitize=address -fno-omit-frame-pointer"

# Runs each requested program in a fork, with the given folder and environment variables, and reports how it ended.
# Importing torch, and under a sanitizer too, takes longer than most programs, so the server does it once for all.
SERVER = """\
import json, os, sys, traceback, torch
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        os.environ.pop("LD_PRELOAD")  # a compiler needs no sanitizer
        for file, path in ((1, request["said"]), (2, request["complained"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), file)
        sys.argv, sys.path[0] = request["arguments"], request["folder"]
        code = 1
        try:
            exec(compile(request["program"], "<program>", "exec"), {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# Prints the first error in the samples of an operator, under one schedule or the other.
ASK = """\
import os, torch
import glow_kernels as gk
torch.manual_seed(0)
{samples}
def fault():
    for seed in range(2):  # every fault comes out under one of the first two
        os.environ["GLOW_KERNELS_SCHEDULE"] = str(seed)
        for sample in samples:
            try:
                with gk.use_backend("native"):
                    results = compute(*sample)
            except RuntimeError as error:
                return str(error)
            with gk.use_backend("reference"):
                expected = compute(*sample)
            if not all(torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in zip(results, expected)):
                return "wrong"
    return "none"
print(fault(), "on the", torch.ops.glow_kernels.native_isa())
"""
# Source lines that define samples and what is computed from each.
SAMPLES = {
    "actnorm_statistics": """\
compute = gk.actnorm_statistics
samples = [(torch.randn(shape),) for shape in ((3, 5, 7, 11), (40, 300))]
""",
    # Many tiles, with the kernels for small tensors and, by claiming no multiprocessors, with those for large ones.
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
    # Likewise, with the elimination in a separate block or not, and on the tensor cores.
    "actnorm_conv1x1": """\
import importlib
whole = importlib.import_module("glow_kernels.ops.actnorm_conv1x1")
def compute(multiprocessors, x, grad, grad_log_det, *parameters):
    os.environ["GLOW_KERNELS_MULTIPROCESSORS"] = multiprocessors
    return *whole._forward(x, *parameters), *whole._backward(grad, grad_log_det, x, *parameters, True)
def sample(multiprocessors, channels, *weight_log_det):
    data = torch.randn(3, channels, 420), torch.randn(3, channels, 420), torch.randn(3)
    weight = torch.linalg.qr(torch.randn(channels, channels)).Q
    return multiprocessors, *data, *torch.randn(2, channels), weight, *weight_log_det
samples = [sample("1", 12, None), sample("0", 12, None), sample("0", 12, torch.tensor(0.5)), sample("0", 27, None)]
""",
    # With more channels than one warp can invert by elimination.
    "folding": """\
from glow_kernels.ops.folding import fold_inverse, lu_weight, lu_weight_backward
def compute(weight, grad, grad_log_det, *factors):
    inverse = fold_inverse(*torch.zeros(2, len(weight)), weight, None)
    return *inverse, *lu_weight(*factors), *lu_weight_backward(grad, grad_log_det, *factors)
def sample(n):
    weight, permutation = torch.linalg.qr(torch.randn(70, 70)).Q, torch.eye(n)[torch.randperm(n)]
    return weight, torch.randn(n, n), torch.randn(()), permutation, *torch.randn(2, n, n), *torch.randn(2, n)
samples = [sample(7), sample(40)]
""",
    # With no multiprocessors no tensor is small: two blocks, in which some warps process three strips in turn. With the
    # small shared memory of sm_86, other kernels are used.
    "actnorm_conv1x1_wide": """\
from glow_kernels.ops.actnorm_conv1x1 import apply, apply_backward, apply_reversible_backward
os.environ["GLOW_KERNELS_MULTIPROCESSORS"] = "0"
def compute(kib, x, grad, matrix, inverse, shift):
    os.environ["GLOW_KERNELS_SHARED_BYTES"] = str(kib * 1024)
    backward = apply_reversible_backward(grad, x, matrix, inverse, shift)
    return apply(x, matrix, shift), *apply_backward(grad, x, matrix), *backward
sizes = ((3, 45, 212), (3, 45, 212), (45, 45), (45, 45), (45,))
channels_last = *(torch.randn(3, 350, 32).mT for _ in range(2)), *map(torch.randn, ((32, 32), (32, 32), (32,)))
contiguous, channels_last = ([0.3 * part for part in sample] for sample in (map(torch.randn, sizes), channels_last))
samples = [(227, *contiguous), (227, *channels_last), (99, *contiguous)]
""",
    # Contiguous data with a channels-last h, in tiles that end within the positions of a thread.
    "affine_coupling": """\
from glow_kernels.ops.affine_coupling import forward, in_place_backward, reversible_backward
os.environ["GLOW_KERNELS_MULTIPROCESSORS"] = "0"
def compute(y, h, grad, grad_log_det):
    options = None, "sigmoid", [1.0, 2.0, 1.0, 0.0, -1.0, 1.0], "chunk_scale_shift", "shift_scale"
    results = forward(y, h, *options)
    apart = reversible_backward(grad, grad_log_det, y, h, *options)[:3]
    halves = [torch.cat((x, x), 1)[:, y.shape[1] :] for x in (grad, y)]
    grad_h = in_place_backward(halves[0], grad_log_det, halves[1], h, *options[1:])
    return *results, *apart, *halves, grad_h
def sample(*sizes):
    y, h, grad = torch.randn(sizes), torch.randn(sizes[0], 2 * sizes[1], *sizes[2:]), torch.randn(sizes)
    return y, h.to(memory_format=torch.channels_last), grad, torch.randn(sizes[0])
samples = [sample(2, 6, 19, 11), sample(2, 40, 7, 5)]
""",
}

# The files with the kernels of an operator, in which faults are planted.
SOURCES = {
    "actnorm_statistics": ["actnorm_statistics.cu"],
    "affine_coupling": ["affine_coupling.cu"],
    "coupling_conv1x1": ["coupling_conv1x1.cu"],
    "actnorm_conv1x1": [
        *(f"actnorm_conv1x1{end}" for end in ("_step.cu", "_parameters.h", "_tile.h", ".cu", "_wide.cu")),
        "warp_elimination.h",
    ],
    "actnorm_conv1x1_wide": ["actnorm_conv1x1_wide.cu", "actnorm_conv1x1.cu"],
    "folding": ["actnorm_conv1x1_fold.cu", "small_matrix.h"],
}


class Fault(NamedTuple):
    """A place in the sources, with the right expression in «», its replacement, and the expected outcome."""

    place: str
    wrong: str = "void()"
    outcome: str = "wrong"


FOLDED = "reinterpret_cast<double*>(matrix + work.matrix_size()), matrix);\n"
SUM = ".add(all[thread + half * width]);\n"

FAULTS = {
    "actnorm_statistics": {
        "no barrier after the first store": Fault("= mine;\n  «__syncthreads()»"),
        "no barrier between two sums": Fault(f"{SUM}    «__syncthreads()»"),
        "a barrier that half of the threads miss": Fault(
            f"{SUM}    «__syncthreads()»", "void(thread < 128 && (__syncthreads(), true))", "waits for ever"
        ),
        "one sample too many": Fault("«batch < planes.batches»", "batch <= planes.batches", "heap-buffer-overflow"),
    },
    "coupling_conv1x1": {
        "no barrier between product and coupling": Fault("reader = Reader<H>(h, span);\n    «__syncthreads()»"),
        "no barrier between coupling and sums": Fault("«__syncthreads()»;\n    sums.add"),
        "no barrier between two tiles": Fault("write_tile(arguments.grad_z, work, span, dx);\n    «__syncthreads()»"),
    },
    "actnorm_conv1x1": {
        "no barrier between scales and folding": Fault("  «__syncthreads()»;\n  for_each_row"),
        "no barrier between folding and product": Fault(f"{FOLDED}  wait_for_copies();\n  «__syncthreads()»"),
        "a copy from between two vectors": Fault(
            "start_copy<V>(matrix + i * frame.row_stride + j, «from» + i", "from + 1", "not aligned"
        ),
        "a product before its tile is there": Fault(f"{FOLDED}  «wait_for_copies()»"),
        "folding before the weight is there": Fault("«wait_for_copies<1>()»", "wait_for_copies<2>()"),
        "no barrier of a warp between a pivot row and its step": Fault(
            "choose_pivot(rows, free, first + k, pivot_row);\n      «__syncwarp()»"
        ),
        "no barrier before pivot rows change": Fault("«__syncthreads()»;  // before others overwrite the pivot rows"),
        "no barrier between folding and product of strips": Fault("        start();\n        «__syncthreads()»"),
    },
    "folding": {
        "no barrier before what a permutation picks is looked for": Fault("end_[i] = 0;\n    }\n    «__syncthreads()»"),
        "no barrier before pivot rows of many channels change": Fault(
            "«__syncthreads()»;  // before others overwrite the pivot rows"
        ),
    },
    "actnorm_conv1x1_wide": {
        "a product before its strip is there": Fault("«wait_for_groups<1>()»", "wait_for_groups<2>()"),
        "no barrier of a warp before products": Fault("wait_for_groups<1>();\n        «__syncwarp()»"),
        "no barrier of a warp before a strip's place is taken": Fault("work(here, pass % 2);\n        «__syncwarp()»"),
        "no barrier of a warp before sums": Fault("put_strip<S>(total, x);\n          «__syncwarp()»"),
        "no barrier between strips and all sums": Fault("  «__syncthreads()»;\n  static_assert(StripSums<S>::kScratch"),
    },
    "affine_coupling": {
        "positions beyond the tensor count": Fault("if («i < spot.count») total += log_factor;", "true"),
        "no barrier before pairs are read": Fault(
            "raw_data = fetch<N>(views.data, tile, spot);\n  load_pairs(exchange, h, tile, pairs);\n  «__syncthreads()»"
        ),
        "no barrier before their gradients are written": Fault(
            "// no other thread reads this pair before the barrier\n  }\n  «__syncthreads()»"
        ),
    },
}
# Included by every file with faults.
PLANTED = """\
#pragma once

#include <cstdlib>
#include <string_view>

inline bool planted(std::string_view fault) {
  static const char* const chosen = std::getenv("PLANTED_FAULT");
  return chosen != nullptr && fault == chosen;
}
"""


def libraries() -> str:
    """The libraries that a process must preload for the sanitizers."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    names = ("libasan.so", "libstdc++.so")
    found = (subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True) for name in names)
    return " ".join(each.stdout.strip() for each in found)


class Tree:
    """A copy of the package and the shim in a folder, without kernels, and a server for programs that use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        without = shutil.ignore_patterns("_C*", "__pycache__", "*.cu")
        for name in ("glow_kernels", "csrc", "tests/cuda_host"):
            shutil.copytree(REPOSITORY / name, folder / name, ignore=without)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(REPOSITORY / name, folder)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GLOW_KERNELS_")}
        environment |= {"LD_PRELOAD": libraries(), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
        command, pipe = [sys.executable, "-c", SERVER], subprocess.PIPE
        self.server = subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)

    def run(self, program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run ``program`` in the folder."""
        said, complained = self.folder / "said", self.folder / "complained"
        request = {"folder": str(self.folder), "program": program, "arguments": ["program", *arguments]}
        request |= {"environment": environment, "said": str(said), "complained": str(complained)}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps(request), file=self.server.stdin, flush=True)
        code = int(self.server.stdout.readline())
        return subprocess.CompletedProcess(program, code, said.read_text(), complained.read_text())


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        pytest.skip("needs a C++ compiler")
    found = Tree(tmp_path_factory.mktemp("shim"))
    with found.server:  # closes its pipes and waits for it
        yield found
        found.server.kill()


def build(tree: Tree, sources: dict[str, str]) -> None:
    """Build a library from only these files of csrc/cuda."""
    cuda = tree.folder / "csrc" / "cuda"
    for earlier in cuda.glob("*.cu"):
        earlier.unlink()
    for name, text in sources.items():
        (cuda / name).write_text(text)
    setup, command = (tree.folder / "setup.py").read_text(), ("--quiet", "build_ext", "--inplace")
    built = tree.run(setup, *command, GLOW_KERNELS_BUILD="cuda-host", CXXFLAGS=SANITIZE)
    assert built.returncode == 0, built.stdout + built.stderr


def with_faults(operator: str) -> dict[str, str]:
    """The sources of ``operator`` with all faults, each active only if ``planted`` returns true for it."""
    sources = {name: (REPOSITORY / "csrc" / "cuda" / name).read_text() for name in SOURCES[operator]}
    places: dict[tuple[str, int, int], str] = {}
    for fault, (place, wrong, _) in FAULTS[operator].items():
        before, right, after = re.split("[«»]", place)
        ((name, text),) = [each for each in sources.items() if before + right + after in each[1]]
        assert text.count(before + right + after) == 1, fault
        start = text.index(before + right + after) + len(before)
        at = name, start, start + len(right)
        places[at] = f'(planted("{fault}") ? {wrong} : {places.get(at, right)})'
    for (name, start, end), text in sorted(places.items(), reverse=True):  # backwards, so that no earlier place moves
        sources[name] = sources[name][:start] + text + sources[name][end:]
    return {name: '#include "planted.h"\n' + text for name, text in sources.items()} | {"planted.h": PLANTED}


def outcome(tree: Tree, program: str, fault: str) -> str:
    """The outcome of ``program`` with this fault."""
    done = tree.run(program, PLANTED_FAULT=fault)
    if done.returncode != 0:
        named = "heap-buffer-overflow" in done.stderr and "parts_kernel" in done.stderr
        return "heap-buffer-overflow" if named else done.stderr
    said, _, isa = done.stdout.rstrip().rpartition(" on the ")
    assert isa == "cuda host shim"
    return next((error for error in ("waits for ever", "not aligned") if error in said), said)


@pytest.mark.parametrize("operator", FAULTS)
def test_planted_faults_are_found(tree, operator):
    build(tree, with_faults(operator))
    program = ASK.format(samples=SAMPLES[operator])
    assert outcome(tree, program, "") == "none"
    outcomes = {fault: outcome(tree, program, fault) for fault in FAULTS[operator]}
    assert outcomes == {fault: expected for fault, (_, _, expected) in FAULTS[operator].items()}


# Loads and stores the registers of each lane as "Matrix Fragments for mma.m16n8k8" in the PTX ISA defines them.
PROBE = """\
#include "cuda/actnorm_conv1x1_mma.h"

namespace glow_kernels {
namespace {

__global__ void probe_kernel(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  const unsigned group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
  const uint32_t left[4] = {a[group * 8 + in_group], a[(group + 8) * 8 + in_group], a[group * 8 + in_group + 4],
                            a[(group + 8) * 8 + in_group + 4]};
  const uint32_t right[2] = {b[in_group * 8 + group], b[(in_group + 4) * 8 + group]};
  unsigned at[4];
  float sums[4];
  for (unsigned i = 0; i < 4; ++i) {
    at[i] = (i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1);
    sums[i] = c[at[i]];
  }
  linear::multiply_add(sums, left, right);
  for (unsigned i = 0; i < 4; ++i) d[at[i]] = sums[i];
}

Tensor probe(const Tensor& a, const Tensor& b, const Tensor& c) {
  Tensor d = empty_output(c);
  const auto bits = [](const Tensor& x) { return reinterpret_cast<const uint32_t*>(x.const_data_ptr<float>()); };
  Launcher{c}(1, 32, 0, probe_kernel, bits(a), bits(b), c.const_data_ptr<float>(), d.mutable_data_ptr<float>());
  return d;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glow_kernels, m) { m.def("probe(Tensor a, Tensor b, Tensor c) -> Tensor"); }
GLOW_KERNELS_CUDA_LIBRARY(m) { m.impl("probe", TORCH_BOX(&probe)); }

}  // namespace glow_kernels
"""
# The inputs are whole numbers plus something in the bits that TF32 drops, so the product is exact.
ASK_PROBE = """\
import torch
import glow_kernels as gk
torch.manual_seed(0)
assert "native" in gk.available_backends()
def with_low_bits(x):
    return (x.view(torch.int32) | torch.randint(0, 1 << 13, x.shape, dtype=torch.int32)).view(torch.float32)
a, b, c = (torch.randint(-9, 10, sizes).float() for sizes in ((16, 8), (8, 8), (16, 8)))
print(torch.equal(torch.ops.glow_kernels.probe(with_low_bits(a), with_low_bits(b), c), a @ b + c))
"""


def test_the_product_of_a_warp_has_the_documented_fragments(tree):
    build(tree, {"probe.cu": PROBE})
    done = tree.run(ASK_PROBE)
    assert done.stdout == "True\n", done.stdout + done.stderr
