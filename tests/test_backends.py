"""The choice of a backend: which are available, what decides, what errors say, and what importing the package costs.

Proven: an explicit choice overrides the environment, which overrides the preference; choices nest, are undone by
exceptions, and reach other threads and compiled code; every operator has a reference and a test file; the import is
lean.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from operators import MODULES, assert_same_bits, registered_operators
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import glow_kernels as gk
from glow_kernels import backends
from glow_kernels.backends import BackendStatus, native
from glow_kernels.errors import BackendUnavailableError, GlowKernelsError, UsageError

UNKNOWN = "backend must be one of native, triton, reference, got 'cuda'"


@pytest.fixture(autouse=True)
def _no_choice_from_outside(monkeypatch):
    """Ignore the choice in the environment of the test run."""
    monkeypatch.setattr(backends, "_chosen", None)
    backends._default_order.cache_clear()
    yield
    backends._default_order.cache_clear()


@pytest.fixture
def only_triton_is_missing(monkeypatch):
    """A machine with every backend but Triton."""

    def status(name: str) -> BackendStatus:
        if name == "triton":
            return BackendStatus(name, False, "Triton is not installed", "run: pip install triton")
        return BackendStatus(name, True, "")

    monkeypatch.setattr(backends, "backend_status", status)
    backends._default_order.cache_clear()


def test_reference_runs_everywhere_and_is_preferred_last():
    assert gk.available_backends()[-1] == "reference"
    assert [name for name in backends.PREFERENCE if name in gk.available_backends()] == list(gk.available_backends())


@pytest.mark.parametrize("name", backends.PREFERENCE)
def test_status_says_why_and_what_to_do(name):
    status = gk.backend_status(name)
    assert status.name == name
    assert status.available == (name in gk.available_backends())
    assert status.reason
    assert status.available or status.remedy


def test_unknown_backend_is_a_usage_error_that_lists_the_known_ones():
    for ask in (gk.backend_status, lambda name: gk.use_backend(name).__enter__()):
        with pytest.raises(UsageError) as caught:
            ask("cuda")
        assert str(caught.value) == UNKNOWN
    assert isinstance(caught.value, GlowKernelsError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2


@pytest.mark.usefixtures("only_triton_is_missing")
def test_refusal_gives_the_reason_and_the_remedy(monkeypatch):
    message = "backend 'triton' is not available: Triton is not installed; run: pip install triton"
    with pytest.raises(BackendUnavailableError) as caught, gk.use_backend("triton"):
        pass
    assert str(caught.value) == message
    monkeypatch.setattr(backends, "_chosen", "triton")
    with pytest.raises(BackendUnavailableError) as caught:
        gk.affine_coupling(torch.zeros(1, 1), torch.zeros(1, 2))
    assert str(caught.value) == message


def chosen_by_environment(name: str) -> str:
    """The output of a new process with this choice in its environment."""
    program = """
import torch, glow_kernels as gk
from glow_kernels import backends
try:
    gk.affine_coupling(torch.zeros(1, 1), torch.zeros(1, 2))
    print(backends.select())
    with gk.use_backend("reference"):
        print(backends.select())
except gk.errors.GlowKernelsError as error:
    print(error)
"""
    environment = os.environ | {"GLOW_KERNELS_BACKEND": name}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_environment_variable_that_names_no_backend_is_refused_when_an_operator_is_called():
    assert chosen_by_environment("cuda") == f"{UNKNOWN}\n"


@pytest.mark.parametrize("name", gk.available_backends())
def test_environment_decides_where_nobody_chooses(name):
    assert chosen_by_environment(name) == f"{name}\nreference\n"


def test_empty_environment_variable_is_none():
    assert chosen_by_environment("") == f"{gk.available_backends()[0]}\nreference\n"


@pytest.mark.usefixtures("only_triton_is_missing")
def test_explicit_choice_beats_the_environment_which_beats_the_preference(monkeypatch):
    assert gk.available_backends() == ("native", "reference")
    assert backends.select() == "native"
    monkeypatch.setattr(backends, "_chosen", "reference")  # as importing the package does from the environment
    assert backends.select() == "reference"
    with gk.use_backend("native"):
        assert backends.select() == "native"
    assert backends.select() == "reference"


@pytest.mark.usefixtures("only_triton_is_missing")
def test_choices_nest_and_are_undone_by_exceptions():
    def fail_inside() -> None:
        with gk.use_backend("native"):
            assert backends.select() == "native"
            raise KeyError("inside")

    with gk.use_backend("reference"):
        with gk.use_backend("native"):
            assert backends.select() == "native"
        assert backends.select() == "reference"
        with pytest.raises(KeyError, match="inside"):
            fail_inside()
        assert backends.select() == "reference"
        with pytest.raises(BackendUnavailableError), gk.use_backend("triton"):
            pass
        assert backends.select() == "reference"
    assert backends.select() == "native"


@pytest.mark.usefixtures("only_triton_is_missing")
def test_choice_holds_in_other_threads():
    seen = []
    with gk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.select()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_every_operator_has_a_reference():
    implementations = [operator.rpartition("_") for operator in registered_operators()]
    reference = {operator for operator, _, backend in implementations if backend == "reference"}
    # Backwards are operators only in other backends; in the reference they are plain PyTorch.
    every = {operator for operator, _, _ in implementations}
    # These are composed of other operators unless the native backend has them as one.
    composed = {"actnorm_conv1x1_forward", "actnorm_conv1x1_inverse"}
    # This one has no derivative, so its reference is plain PyTorch too.
    plain = {"scale_filters_forward_all"}
    assert {operator for operator in every - reference if "backward" not in operator} <= composed | plain


def test_every_registered_operator_has_a_test_file():
    assert registered_operators() == sorted(operator for module in MODULES for operator in registered_operators(module))
    missing = [module for module in MODULES if not (Path(__file__).parent / f"test_{module}.py").exists()]
    assert missing == []


def operators_in(graph: torch.fx.GraphModule) -> set[str]:
    """Names of this package's operators in a compiled graph."""
    targets = (str(node.target) for node in graph.graph.nodes)
    return {target for target in targets if target.startswith("glow_kernels.")}


def test_compiled_code_follows_the_choice():
    # The choice is a guard of compiled code: a new choice recompiles, one seen before does not.
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gk.affine_coupling, fullgraph=True, backend=counter)
    x, h = torch.randn(2, 3, 5), torch.randn(2, 6, 5)
    expected = gk.affine_coupling(x, h)
    assert_same_bits(compiled(x, h), expected)
    assert counter.frame_count == 1
    for count, name in enumerate(gk.available_backends(), start=2):
        with gk.use_backend(name):
            assert_same_bits(compiled(x, h), gk.affine_coupling(x, h))
        assert counter.frame_count == count
        assert operators_in(counter.graphs[-1]) == {f"glow_kernels.affine_coupling_forward_{name}.default"}
    assert_same_bits(compiled(x, h), expected)
    assert counter.frame_count == 1 + len(gk.available_backends())


def test_backend_may_be_chosen_inside_compiled_code(backend):
    torch._dynamo.reset()

    def choose_and_compute(x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with gk.use_backend(backend):
            return gk.affine_coupling(x, h)

    counter = CompileCounterWithBackend("aot_eager")
    x, h = torch.randn(2, 3, 5), torch.randn(2, 6, 5)
    actual = torch.compile(choose_and_compute, fullgraph=True, backend=counter)(x, h)
    assert_same_bits(actual, choose_and_compute(x, h))
    assert operators_in(counter.graphs[-1]) == {f"glow_kernels.affine_coupling_forward_{backend}.default"}


class Coupling(nn.Module):
    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gk.affine_coupling(x, h)


LOAD = """
import sys, torch, glow_kernels
from glow_kernels.backends.native import library
library.PACKAGE /= sys.argv[2]
x, h, *results = torch.load(sys.argv[1] + ".pt")
exported = torch.export.load(sys.argv[1] + ".pt2").module()
torch.testing.assert_close(exported(x, h), tuple(results))
print(*torch.ops.loaded_libraries)
"""


@pytest.mark.parametrize("library", [".", "none"])
def test_exported_program_opens_the_library_of_another_process_or_does_without(tmp_path, backend, library):
    native.isa.cache_clear()
    x, h = torch.randn(2, 3, 5), torch.randn(2, 6, 5)
    exported = torch.export.export(Coupling(), (x, h))
    assert operators_in(exported.graph_module) == {f"glow_kernels.affine_coupling_forward_{backend}.default"}
    torch.export.save(exported, tmp_path / "program.pt2")
    torch.save((x, h, *gk.affine_coupling(x, h)), tmp_path / "program.pt")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "program"), library]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ("_C.so" in result.stdout) == (backend == "native" and library == ".")


def test_exported_program_takes_any_number_of_vectors():
    batch = {0: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(Coupling(), (torch.randn(2, 3), torch.randn(2, 6)), dynamic_shapes=(batch, batch))
    x, h = torch.randn(600, 3), torch.randn(600, 6)
    torch.testing.assert_close(exported.module()(x, h), gk.affine_coupling(x, h))


LEAN_IMPORT = """
import sys, torch
before = set(sys.modules)
import glow_kernels
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(loaded & {"triton", "matplotlib", "sklearn", "PIL", "tensorboard", "tqdm", "safetensors"}))
print(sorted(name for name in set(sys.modules) - before if name in ("torch._dynamo", "torch._inductor")))
print(torch.cuda.is_initialized(), sorted(torch.ops.loaded_libraries))
"""


def test_import_loads_no_triton_no_compiler_no_library_and_makes_no_cuda_context():
    result = subprocess.run([sys.executable, "-c", LEAN_IMPORT], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[]", "[]", "False []"]
    assert result.stderr == ""
