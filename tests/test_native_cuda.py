"""The CUDA library from Python: when it is loaded, the reasons given if it cannot be, and when it is chosen.

No GPU is needed: torch's answers about GPUs and the library's description are faked.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import glow_kernels as gk
from glow_kernels import cli, tuning
from glow_kernels.backends import faster
from glow_kernels.backends.native import cuda, library, support
from glow_kernels.errors import BackendUnavailableError

ARCHS = [80, 86, 89, 90, 100, 120]
HOPPER = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A fake machine with a CUDA torch, an H100, nvcc and a library built for it; a test may change all of this."""
    machine = SimpleNamespace(capability=(9, 0), package=tmp_path / "glow_kernels", nvcc="/usr/local/cuda/bin/nvcc")
    machine.package.mkdir()
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (machine.package / "_C_cuda.so").touch()
    describe(machine)
    monkeypatch.setattr(library, "PACKAGE", machine.package)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: HOPPER)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: machine.capability)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(shutil, "which", lambda name: machine.nvcc)
    forget()
    yield machine
    forget()


def forget() -> None:
    for function in (cuda._load, cuda.status, cuda._takes, faster._table):
        function.cache_clear()


def describe(gpu: SimpleNamespace, **changes: object) -> None:
    csrc = library.source_hash(gpu.package.parent / "csrc", "cuda")
    built = {"torch": "2.13.0", "machine": platform.machine(), "nvcc": "13.0", "archs": ARCHS, "csrc": csrc}
    (gpu.package / "_C_cuda.json").write_text(json.dumps(built | changes))


def test_a_library_for_this_gpu_is_used(gpu: SimpleNamespace) -> None:
    status = cuda.status()
    assert (status.available, status.remedy) == (True, "")
    assert status.reason == f"CUDA C++, built with CUDA 13.0; on {HOPPER}"
    assert cuda.takes(0)


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (ARCHS, (8, 0), True),
        (ARCHS, (8, 7), True),  # machine code of sm_86
        (ARCHS, (10, 3), True),  # machine code of sm_100
        (ARCHS, (11, 0), False),  # neither machine code nor older intermediate code
        (ARCHS, (12, 1), True),
        (ARCHS, (13, 0), True),  # intermediate code of sm_120
        ([90], (8, 0), False),
        ([90], (12, 0), True),
        ([86], (8, 0), False),
    ],
)
def test_which_gpus_a_library_runs_on(archs: list[int], capability: tuple[int, int], runs: bool) -> None:
    assert (cuda._unfit(capability, archs) == "") == runs


@pytest.mark.parametrize(
    ("change", "reason", "remedy"),
    [
        ("torch without CUDA", "this torch is built without CUDA", "install a torch with CUDA"),
        ("no GPU", "no usable NVIDIA GPU or driver", "nvidia-smi"),
        (
            "not built",
            "the native CUDA library is not built",
            "run 'make build-cuda' in a source tree, or GLOW_KERNELS",
        ),
        ("no nvcc", "the native CUDA library is not built", "there is no nvcc: install the CUDA toolkit 12.8 or newer"),
        ("another CUDA", "it is built with CUDA 12.8, and this torch with CUDA 13.0", "then run 'make build-cuda'"),
        ("another machine", f"it is built for s390x, this is {platform.machine()}", "remove "),
    ],
)
def test_why_the_library_cannot_be_used(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, change: str, reason: str, remedy: str
) -> None:
    match change:
        case "torch without CUDA":
            monkeypatch.setattr(torch.version, "cuda", None)
        case "no GPU":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        case "not built":
            (gpu.package / "_C_cuda.so").unlink()
        case "no nvcc":
            (gpu.package / "_C_cuda.so").unlink()
            gpu.nvcc = None
        case "another CUDA":
            describe(gpu, nvcc="12.8")
        case "another machine":
            describe(gpu, machine="s390x")
    status = cuda.status()
    assert not status.available
    assert reason in status.reason
    assert status.reason.endswith("; Triton or the reference computes on the GPU instead")
    assert remedy in status.remedy
    assert not cuda.takes(0)


@pytest.mark.parametrize(
    ("archs", "capability", "reason"),
    [
        (ARCHS, (7, 5), "which is sm_75, too old: sm_80 or newer is needed"),
        ([80, 86], (9, 0), ""),
        ([100, 120], (9, 0), "which is sm_90, for which the native CUDA library has no code (sm_100, sm_120): run "
         "GLOW_KERNELS_CUDA_ARCHS=90 make build-cuda"),
    ],
)  # fmt: skip
def test_a_gpu_that_the_library_has_no_code_for_is_named_once(
    gpu: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
    archs: list[int],
    capability: tuple[int, int],
    reason: str,
) -> None:
    gpu.capability = capability
    describe(gpu, archs=archs)
    with caplog.at_level(logging.WARNING):
        assert cuda.takes(0) == cuda.takes(0) == (not reason)
    message = f"{HOPPER}, {reason}; Triton or the reference computes on the GPU instead"
    assert [record.getMessage() for record in caplog.records] == ([message] if reason else [])
    assert reason in cuda.status().reason


def test_a_library_that_is_out_of_date_is_named_and_used(gpu: SimpleNamespace) -> None:
    (gpu.package.parent / "csrc" / "cuda" / "new.cu").touch()
    status = cuda.status()
    assert status.available
    assert status.reason.endswith("; out of date: csrc has changed")
    assert status.remedy == "run 'make build-cuda'"
    assert cuda.takes(0)


def test_info_shows_both_libraries(gpu: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert (
        f"    on CUDA   available             CUDA C++, built with CUDA 13.0; on {HOPPER}\n" in capsys.readouterr().out
    )


# The choice of a backend for CUDA tensors.


def cuda_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A fake CUDA tensor with the attributes that the choice reads."""

    class Fake(torch.Tensor):
        is_cpu = False
        is_cuda = True

        def get_device(self) -> int:
            return 0

    return torch.empty(shape, dtype=dtype, device="meta").as_subclass(Fake)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The operators of the fake library."""
    names: set[str] = set()
    monkeypatch.setattr(support, "_has_kernel", lambda *name: name in names)
    return names


def test_cuda_tensors_are_taken_where_the_library_has_the_operator(gpu: SimpleNamespace, registered: set[str]) -> None:
    x, h = cuda_tensor(2, 3, 4), cuda_tensor(2, 6, 4)
    assert not support.gaussian_log_prob("forward", x, h, "")
    registered.add(("gaussian_log_prob", "forward", "CUDA"))
    assert support.gaussian_log_prob("forward", x, h, "")
    assert not support.gaussian_log_prob("sample", x, h, "")
    assert not support.gaussian_log_prob("forward", x, torch.empty(2, 6, 4), "")
    assert not support.gaussian_log_prob("forward", x, h.to(torch.float64), "")
    gpu.capability = (7, 5)
    cuda._takes.cache_clear()
    assert not support.gaussian_log_prob("forward", x, h, "")


@pytest.mark.parametrize(
    ("shape", "takes"), [((512, 15), False), ((511, 15), True), ((512, 16), True), ((512, 3, 5), True)]
)
def test_many_short_vectors_are_left_to_the_reference_on_the_cpu(monkeypatch, gpu, registered, shape, takes) -> None:
    monkeypatch.setattr(support, "_is_host_shim", lambda: False)
    names = [("affine_coupling", "backward"), ("gaussian_log_prob", "forward")]
    registered.update((*name, key) for name in names for key in ("CPU", "CUDA"))
    for make, expected in ((torch.empty, takes), (cuda_tensor, True)):
        x, h = make(*shape), make(shape[0], 2 * shape[1], *shape[2:])
        assert support.affine_coupling("backward", x, x, x, h) == expected
        assert support.gaussian_log_prob("forward", x, h, "") == expected


def test_filters_are_converted_on_a_gpu_and_not_on_the_cpu(gpu: SimpleNamespace, registered: set[str]) -> None:
    registered.update({("scale_filters", "backward_all", key) for key in ("CPU", "CUDA")})
    half = torch.bfloat16
    for make, takes in ((cuda_tensor, True), (torch.empty, False)):
        weight, vector = make(4, 3, 3, 3), make(4)
        grad, filters = make(4, 3, 3, 3, dtype=half), ([weight], [vector], [vector], [1.0])
        assert support.scale_filters("backward_all", [weight, vector], *filters)
        assert support.scale_filters("backward_all", [grad, vector], *filters) == takes
        assert support.scale_filters("backward_all", [grad, make(4, dtype=half)], *filters) == takes
        assert not support.scale_filters("backward_all", [grad, make(4, dtype=torch.float16)], *filters)
        assert not support.scale_filters("backward_all", [grad.transpose(2, 3), vector], *filters)
        assert not support.scale_filters("backward_all", [weight, vector], [weight], [vector.double()], *filters[2:])


def test_the_linear_map_that_folds_is_for_the_channels_of_its_kernels(
    gpu: SimpleNamespace, registered: set[str]
) -> None:
    registered.add(("actnorm_conv1x1", "forward", "CPU"))
    for function in ("forward", "backward"):
        registered.add(("actnorm_conv1x1", function, "CUDA"))
    for make, channels, dtype, takes in (
        (cuda_tensor, 64, torch.bfloat16, True),
        (cuda_tensor, 65, torch.float32, False),
        (cuda_tensor, 60, torch.float64, True),
        (cuda_tensor, 61, torch.float64, False),
        (torch.empty, 65, torch.float32, True),
    ):
        x, grad_log_det = make(2, channels, 3, dtype=dtype), make(2)
        parameters = (make(channels), make(channels), make(channels, channels), None)
        assert support.actnorm_conv1x1("forward", x, *parameters) == takes
        if x.is_cuda:
            assert support.actnorm_conv1x1("backward", x, grad_log_det, x, *parameters, True) == takes
        assert not support.actnorm_conv1x1("inverse", x, *parameters)


def test_the_coupling_with_the_next_linear_map_is_for_gpus(gpu: SimpleNamespace, registered: set[str]) -> None:
    registered.update({("coupling_conv1x1", function, "CUDA") for function in ("forward", "backward")})
    half, double = torch.bfloat16, torch.float64
    for make, channels, types, takes in (
        (cuda_tensor, 64, (torch.float32, half), True),
        (cuda_tensor, 65, (torch.float32, half), False),
        (cuda_tensor, 4, (half, half), True),
        (cuda_tensor, 4, (half, torch.float32), False),
        (cuda_tensor, 4, (double, double), False),
        (torch.empty, 4, (torch.float32, half), False),
    ):
        z, h = make(2, channels, 3, dtype=types[0]), make(2, 2, 3, dtype=types[1])
        matrix = make(channels, channels, dtype=torch.promote_types(types[0], torch.float32))
        assert support.coupling_conv1x1("forward", z, h, matrix, matrix) == takes
        assert support.coupling_conv1x1("backward", z, z, z, h, matrix) == takes
        assert not support.coupling_conv1x1("forward", z, h, matrix.to(half), matrix)


ALL = ("native", "triton", "reference")


def test_without_a_table_cuda_code_is_first_on_a_gpu(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(faster, "TABLES", tmp_path)
    x = cuda_tensor(2, 3, 4)
    assert faster.first(ALL, "gaussian_log_prob_forward", (x,)) == ALL
    assert faster.first(ALL, "gaussian_log_prob_forward", (torch.empty(2, 3, 4),)) == ALL
    for chosen in (("native", "reference"), ("triton", "reference"), ("reference",)):
        assert faster.first(chosen, "gaussian_log_prob_forward", (x,)) == chosen


def test_a_table_chooses_by_operator_and_size(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(faster, "TABLES", tmp_path)
    table = {"gaussian_log_prob_backward": [[100, "native"], [1000, "triton"], [10000, "native"]]}
    table["affine_coupling_forward"] = [[10000, "native"]]
    (tmp_path / "nvidia_h100_80gb_hbm3.json").write_text(json.dumps(table))
    weight = cuda_tensor(1)

    def first(count: int, operator: str = "gaussian_log_prob_backward") -> str:
        return faster.first(ALL, operator, (weight, cuda_tensor(count), weight, "layout"))[0]

    assert [first(count) for count in (1, 100, 101, 1000, 1001, 10000, 10001)] == [
        *("native", "native", "triton", "triton", "native", "native", "native"),
    ]
    assert first(1, "gaussian_log_prob_forward") == first(1, "affine_coupling_forward") == "native"
    # The name of the GPU is cached, since asking for it takes longer than a launch.
    monkeypatch.setattr(torch.cuda, "get_device_name", None)
    assert first(1000) == "triton"
    of_lists = ([cuda_tensor(60), cuda_tensor(40)], [weight], [weight])
    assert faster.first(ALL, "gaussian_log_prob_backward", of_lists)[0] == "native"
    assert faster.elements(of_lists) == 100


def test_every_shipped_table_names_operators_and_backends() -> None:
    for path in faster.TABLES.glob("*.json"):
        for operator, pairs in json.loads(path.read_text()).items():
            assert hasattr(torch.ops.glow_kernels, f"{operator}_native"), path
            assert {name for _, name in pairs} <= {"native", "triton"}, path
            assert [limit for limit, _ in pairs] == sorted(limit for limit, _ in pairs), path


def test_comparing_writes_the_table_that_the_choice_reads(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tuning, "backend_status", lambda name: SimpleNamespace(available=True))
    arguments = tuning._arguments
    monkeypatch.setattr(tuning, "_arguments", lambda *size: arguments(*size[:2], torch.device("meta")))

    # CUDA C++ has less overhead, Triton more bandwidth.
    def seconds(operator: str, args: tuple[object, ...]) -> float:
        return 1 + faster.elements(args) / 1e5 if operator.endswith("native") else 2.0

    monkeypatch.setattr(tuning, "_seconds", seconds)
    path, table = tuning.compare(tmp_path)
    assert path == tmp_path / "nvidia_h100_80gb_hbm3.json"
    assert json.loads(path.read_text()).keys() == table.keys()
    # Every operator that both backends have.
    every = torch._C._dispatch_get_all_op_names()
    ours = {
        name.removesuffix("_native")
        for name in every
        if name.startswith("glow_kernels::") and name.endswith("_native") and f"{name[:-6]}triton" in every
    }
    assert {f"glow_kernels::{operator}" for operator in table} == ours
    monkeypatch.setattr(faster, "TABLES", tmp_path)
    x, h = cuda_tensor(1, 12, 4, 4), cuda_tensor(1, 24, 4, 4)
    assert faster.first(ALL, "affine_coupling_forward", (x, h))[0] == "native"
    x, h = cuda_tensor(64, 12, 32, 32), cuda_tensor(64, 24, 32, 32)
    assert faster.first(ALL, "affine_coupling_forward", (x, h))[0] == "triton"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_comparing_without_a_gpu_names_the_reason() -> None:
    with pytest.raises(BackendUnavailableError, match="there is nothing to compare: "):
        gk.tuning.compare()
