"""setup.py compiles the native library or reports why not; the loader opens it or reports why not."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch
from packaging.requirements import Requirement

from glow_kernels.backends import native
from glow_kernels.backends.native import library as loader

REPOSITORY = Path(__file__).parents[1]
COMPILERS = ("c++", "g++", "clang++")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX") or "", *COMPILERS))), reason="needs a C++ compiler"
)

# A kernel that returns its variant, and one that calls an inline function shared by all variants.
HEADER = """\
#pragma once
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
inline __attribute__((noinline)) int shared() {
  volatile int lanes = LANES;
  return lanes;
}
namespace glow_kernels {
namespace baseline { int lanes(); int shared_lanes(); }
namespace avx2 { int lanes(); int shared_lanes(); }
namespace avx512 { int lanes(); int shared_lanes(); }
}
"""
KERNEL = """\
#include "probe.h"
namespace glow_kernels::GLOW_KERNELS_ISA {
int lanes() { return LANES; }
int shared_lanes() { return shared(); }
}
"""
OPERATOR = """\
#include <torch/csrc/stable/library.h>
#include "cpu/isa.h"
#include "probe.h"
using namespace glow_kernels;
std::vector<int64_t> probe() {
#ifdef GLOW_KERNELS_HAS_AVX512
  if (isa() == Isa::avx512) return {avx512::lanes(), avx512::shared_lanes()};
#endif
#ifdef GLOW_KERNELS_HAS_AVX2
  if (isa() == Isa::avx2) return {avx2::lanes(), avx2::shared_lanes()};
#endif
  return {baseline::lanes(), baseline::shared_lanes()};
}
STABLE_TORCH_LIBRARY_FRAGMENT(glow_kernels, m) {
  m.def("probe() -> int[]");
  m.impl("probe", TORCH_BOX(&probe));
}
"""
LANES = {"baseline": 4, "avx2": 8, "avx512": 16}
# Loads the library once for every value of GLOW_KERNELS_ISA in the arguments, each time in a new process.
ASK = """\
import json, os, sys, torch
from glow_kernels.backends import backend_status
loaded_by_import = list(torch.ops.loaded_libraries)
for isa in sys.argv[1:]:
    if os.fork() == 0:
        os.environ["GLOW_KERNELS_ISA"] = isa
        status, ops = backend_status("native"), torch.ops.glow_kernels
        answer = [loaded_by_import, status.available, status.reason, ops.native_isa(), ops.probe()]
        print(json.dumps(answer), flush=True)
        os._exit(0)
    os.wait()
"""

# A "compiler" that every machine has, for tests that stop before using it.
BUILD_ANYWHERE = {"GLOW_KERNELS_BUILD": "cpu", "CXX": sys.executable}


def source_tree(folder: Path, csrc: dict[str, str]) -> Path:
    """A copy of the repository with these files for csrc."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    shutil.copytree(
        REPOSITORY / "glow_kernels", folder / "glow_kernels", ignore=shutil.ignore_patterns("_C*", "__pycache__")
    )
    for name, text in csrc.items():
        path = folder / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def setup(tree: Path, *arguments: str, environment: dict[str, str], options: tuple[str, ...] = ()) -> tuple[int, str]:
    """Run ``tree``'s setup.py; returns its exit status and everything that it printed."""
    done = subprocess.run(
        [sys.executable, *options, "setup.py", "--quiet", *arguments],
        cwd=tree,
        env=clean_environment() | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("GLOW_KERNELS_")}


# The loader, with files that need no compiler.


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path where the loader looks, in a temporary source tree; the library itself is not there yet."""
    (tmp_path / "glow_kernels").mkdir()
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    monkeypatch.setattr(loader, "PACKAGE", tmp_path / "glow_kernels")
    return tmp_path / "glow_kernels" / "_C.so"


def describe(library: Path, **changes: str) -> None:
    csrc = loader.source_hash(library.parents[1] / "csrc", "cpu")
    built = {"torch": "2.13.0", "machine": platform.machine(), "csrc": csrc}
    library.with_suffix(".json").write_text(json.dumps(built | changes))


def elf(machine: int, sections: int) -> bytes:
    """The header of a 64-bit shared library that announces a section table, which is missing."""
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    return identity + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 64, 0, 64, 56, 0, 64, sections, 0)


def test_a_library_that_is_not_built(library: Path) -> None:
    status = native.status()
    assert (status.available, status.reason) == (False, "the native library is not built")
    assert "'make build'" in status.remedy
    assert "GLOW_KERNELS_BUILD=cpu pip install --no-build-isolation" in status.remedy


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"not a library", "_C.so", id="text"),
        pytest.param(b"", "_C.so", id="empty"),
        pytest.param(elf(machine=22, sections=0), "_C.so", id="another architecture's, described as this one's"),
        pytest.param(elf(machine=62, sections=30), "the file is cut short", id="truncated"),
    ],
)
def test_a_library_that_cannot_be_loaded(library: Path, content: bytes, reason: str) -> None:
    library.write_bytes(content)
    describe(library)
    status = native.status()
    assert not status.available
    assert status.reason.startswith("the native library cannot be loaded: ")
    assert reason in status.reason
    assert "\n" not in status.reason
    assert status.remedy.startswith(f"remove {library}, then run 'make build'")


def test_a_library_of_another_architecture(library: Path) -> None:
    library.write_bytes(elf(machine=22, sections=0))
    describe(library, machine="s390x")
    status = native.status()
    assert not status.available
    assert f"it is built for s390x, this is {platform.machine()}" in status.reason


@pytest.mark.parametrize("description", [None, "", "{"])
def test_a_library_without_a_description(library: Path, description: str | None) -> None:
    library.touch()
    if description is not None:
        library.with_suffix(".json").write_text(description)
    status = native.status()
    assert not status.available
    assert "its description _C.json cannot be read" in status.reason


def test_a_torch_that_is_too_old(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.touch()
    describe(library)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1+cu128"))
    status = native.status()
    assert not status.available
    assert status.reason == "the native library needs torch 2.10 or newer, this is 2.9.1+cu128"


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        *(("nothing", False), ("a source", True), ("a new header", True)),
        *(("the readme", False), ("a CUDA source", False), ("no csrc at all", False)),
    ],
)
def test_a_library_that_is_out_of_date(
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: str,
    stale: bool,
) -> None:
    csrc = library.parents[1] / "csrc"
    (csrc / "cpu" / "a.cpp").write_text("int a;")
    library.touch()
    describe(library)
    match change:
        case "a source":
            (csrc / "cpu" / "a.cpp").write_text("int b;")
        case "a new header":
            (csrc / "include").mkdir()
            (csrc / "include" / "a.h").touch()
        case "the readme":
            (csrc / "README.md").write_text("more")
        case "a CUDA source":
            (csrc / "cuda").mkdir()
            (csrc / "cuda" / "a.cu").touch()
        case "no csrc at all":
            shutil.rmtree(csrc)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(native, "isa", lambda: "avx2")
    monkeypatch.delenv("GLOW_KERNELS_ISA", raising=False)

    with caplog.at_level(logging.WARNING):
        status = native.status()

    assert status.available
    assert status.reason.startswith("C++ on the CPU, avx2, built with torch 2.13.0")
    assert ("out of date" in status.reason) == stale
    assert status.remedy == ("run 'make build'" if stale else "")
    assert len(caplog.records) == stale


# setup.py if nothing can be compiled.


@pytest.fixture(scope="module")
def bare_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_tree(tmp_path_factory.mktemp("bare") / "tree", {"cpu/a.cpp": "", "include/a.h": "", "README.md": ""})


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("mode", ["", "none", "auto"])
def test_without_a_compiler_the_wheel_is_pure(bare_tree: Path, tmp_path: Path, mode: str) -> None:
    code, said = setup(bare_tree, "bdist_wheel", "-d", str(tmp_path), environment={"GLOW_KERNELS_BUILD": mode})
    assert code == 0, said
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "_C" in name]
    assert ("no C++ compiler (looked for c++, g++, clang++)" in said) == (mode == "auto")


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"GLOW_KERNELS_BUILD": "cpu"}, "no C++ compiler (looked for c++, g++, clang++); install g++ or clang++"),
        ({"GLOW_KERNELS_BUILD": "cpu", "CXX": "nope -O1"}, "no C++ compiler (looked for nope -O1)"),
        ({"GLOW_KERNELS_BUILD": "cuda"}, "GLOW_KERNELS_BUILD=cuda: no C++ compiler (looked for c++, g++, clang++)"),
        ({"GLOW_KERNELS_BUILD": "gpu"}, "GLOW_KERNELS_BUILD must be none, cpu, cuda or auto, got 'gpu'"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(bare_tree: Path, environment: dict[str, str], reason: str) -> None:
    code, said = setup(bare_tree, "--version", environment=environment)
    assert code == 1
    assert said.startswith("glow_kernels: ")
    assert reason in said
    assert said.count("\n") == 1


def test_an_isolated_build_has_no_torch(bare_tree: Path, tmp_path: Path) -> None:
    for name in ("setuptools", "_distutils_hack"):
        (tmp_path / name).symlink_to(Path(setuptools.__file__).parents[1] / name)
    environment = BUILD_ANYWHERE | {"PYTHONPATH": str(tmp_path)}
    code, said = setup(bare_tree, "--version", environment=environment, options=("-S",))
    assert code == 1
    assert "add --no-build-isolation to pip's options" in said
    assert said.count("\n") == 1


def test_a_torch_that_is_too_old_to_build_with(bare_tree: Path, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch-2.9.1.dist-info").mkdir()
    (tmp_path / "torch-2.9.1.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.9.1\n")
    environment = BUILD_ANYWHERE | {"PYTHONPATH": str(tmp_path)}
    code, said = setup(bare_tree, "--version", environment=environment)
    assert code == 1
    assert "torch 2.9.1 is too old; install torch 2.10 or newer" in said
    assert said.count("\n") == 1


def test_a_source_distribution_holds_csrc(bare_tree: Path, tmp_path: Path) -> None:
    code, said = setup(bare_tree, "sdist", "-d", str(tmp_path), environment={})
    assert code == 0, said
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "csrc/cpu/a.cpp", "csrc/include/a.h"} <= names


# setup.py and nvcc, which need not be installed.


def nvcc_of(release: str, folder: Path) -> dict[str, str]:
    """An environment with a fake nvcc that reports this release and cannot compile."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.99'\n")
    nvcc.chmod(0o755)
    return BUILD_ANYWHERE | {"GLOW_KERNELS_BUILD": "cuda", "CUDA_HOME": str(folder)}


def test_without_nvcc_cuda_is_refused_in_one_line(
    bare_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    environment = BUILD_ANYWHERE | {"GLOW_KERNELS_BUILD": "cuda", "CUDA_HOME": "/nowhere"}
    code, said = setup(bare_tree, "--version", environment=environment)
    assert code == 1
    assert said == (
        "glow_kernels: GLOW_KERNELS_BUILD=cuda: no nvcc (looked for /nowhere/bin/nvcc, nvcc); "
        "install the CUDA toolkit 12.8 or newer, or set CUDA_HOME\n"
    )


def test_an_nvcc_that_is_too_old_is_refused_in_one_line(bare_tree: Path, tmp_path: Path) -> None:
    code, said = setup(bare_tree, "--version", environment=nvcc_of("12.6", tmp_path))
    assert code == 1
    assert f"nvcc 12.6 at {tmp_path}/bin/nvcc is too old; install the CUDA toolkit 12.8 or newer" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("archs", "code"), [("90", 0), ("80,90", 0), ("80 90;100", 0), ("sm_90", 1), ("90,", 1)])
def test_the_architectures_asked_for(bare_tree: Path, tmp_path: Path, archs: str, code: int) -> None:
    environment = nvcc_of("13.0", tmp_path) | {"GLOW_KERNELS_CUDA_ARCHS": archs}
    got, said = setup(bare_tree, "--version", environment=environment)
    assert got == code
    message = f"GLOW_KERNELS_CUDA_ARCHS must be a list of architectures such as 80,90, got {archs!r}"
    assert (message in said) == (code == 1)


@needs_compiler
def test_without_nvcc_auto_builds_the_rest_and_says_so(tmp_path: Path) -> None:
    tree = source_tree(tmp_path / "tree", {"cpu/a.cpp": "", "cuda/a.cu": ""})
    environment = nvcc_of("11.8", tmp_path) | {"GLOW_KERNELS_BUILD": "auto"}
    environment.pop("CXX")
    code, said = setup(tree, "build_ext", "--inplace", environment=environment)
    assert code == 0, said
    assert "which could not be built: nvcc 11.8 at" in said
    assert "WITHOUT its native CUDA library (Triton or the reference computes on GPUs)" in said
    assert {path.name for path in tree.glob("glow_kernels/_C*")} == {"_C.so", "_C.json"}


# setup.py with a compiler, on the sources that every library has and a kernel that returns its variant.


@pytest.fixture(scope="module")
def built_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree with a wheel that contains the library in dist/, and its contents in installed/."""
    real = ("cpu/isa.h", "cpu/isa.cpp", "cpu/library.cpp")
    sources = {name: (REPOSITORY / "csrc" / name).read_text() for name in real}
    sources |= {"cpu/kernels/probe.cpp": KERNEL, "cpu/probe.cpp": OPERATOR, "include/probe.h": HEADER}
    tree = source_tree(tmp_path_factory.mktemp("built") / "tree", sources)
    code, said = setup(tree, "bdist_wheel", environment={"GLOW_KERNELS_BUILD": "cpu"})
    assert code == 0, said
    (wheel,) = (tree / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tree / "installed")
    return tree


def test_development_takes_the_triton_that_torch_asks_for() -> None:
    """The versions of torch 2.10 and 2.13 for NVIDIA GPUs are accepted, or pip would replace them."""
    wanted = map(Requirement, importlib.metadata.requires("glow_kernels") or ())
    (triton,) = [requirement for requirement in wanted if requirement.name == "triton"]
    assert triton.specifier.contains("3.6.0")
    assert triton.specifier.contains("3.7.1")


@needs_compiler
def test_the_wheel_is_for_every_python_and_tells_nothing_of_this_machine(built_tree: Path) -> None:
    (wheel,) = (built_tree / "dist").glob("*.whl")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    library = built_tree / "installed" / "glow_kernels" / "_C.so"
    built = json.loads(library.with_suffix(".json").read_text())
    assert (built["torch"], built["machine"]) == (importlib.metadata.version("torch"), platform.machine())
    assert built["isas"][0] == "baseline"
    assert built["csrc"] == loader.source_hash(built_tree / "csrc", "cpu")
    for path in (library, library.with_suffix(".json")):
        for folder in (built_tree, Path(torch.__file__).parent):
            assert str(folder).encode() not in path.read_bytes()


@needs_compiler
def test_the_library_computes_with_the_instruction_set_asked_for(
    built_tree: Path,
) -> None:
    environment = clean_environment() | {"PYTHONPATH": str(built_tree / "installed")}
    command = [sys.executable, "-c", ASK, "baseline", "mmx"]
    said = subprocess.run(
        command, cwd=built_tree / "installed", env=environment, check=True, stdout=subprocess.PIPE
    ).stdout
    built_with = f"built with torch {importlib.metadata.version('torch')}"
    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    in_vain = f"{best} (GLOW_KERNELS_ISA=mmx is not available here)"
    # The second number is baseline's in every variant: a function that they share must run on every processor.
    assert [json.loads(line) for line in said.splitlines()] == [
        [[], True, f"C++ on the CPU, baseline, {built_with}", "baseline", [4, 4]],
        [[], True, f"C++ on the CPU, {in_vain}, {built_with}", best, [LANES[best], 4]],
    ]


@needs_compiler
def test_building_in_place_compiles_only_what_changed(built_tree: Path) -> None:
    in_place = ("build_ext", "--inplace")
    code, said = setup(built_tree, *in_place, environment={"GLOW_KERNELS_BUILD": "cpu"})
    assert (code, said) == (0, "")
    with (built_tree / "csrc" / "cpu" / "isa.cpp").open("a") as file:
        file.write("// changed\n")
    code, said = setup(built_tree, *in_place, environment={"GLOW_KERNELS_BUILD": "cpu"})
    assert (code, said.split()) == (0, ["compiling", "csrc/cpu/isa.cpp"])
    built = json.loads((built_tree / "glow_kernels" / "_C.json").read_text())
    assert built["csrc"] == loader.source_hash(built_tree / "csrc", "cpu")


@needs_compiler
def test_builds_with_other_options_leave_each_other_what_they_compiled(tmp_path: Path) -> None:
    tree = source_tree(tmp_path / "tree", {"cpu/a.cpp": "", "cpu/kernels/a.cpp": ""})
    plain = {"GLOW_KERNELS_BUILD": "cpu"}
    other = plain | {"CXXFLAGS": "-O1", "GLOW_KERNELS_ISAS": "baseline"}
    for environment, compiles in ((plain, True), (other, True), (plain, False), (other, False)):
        code, said = setup(tree, "build_ext", "--inplace", environment=environment)
        assert (code, "compiling" in said) == (0, compiles)
    assert json.loads((tree / "glow_kernels" / "_C.json").read_text())["isas"] == ["baseline"]


@needs_compiler
@pytest.mark.parametrize("mode", ["cpu", "auto"])
def test_a_source_that_does_not_compile(tmp_path: Path, mode: str) -> None:
    tree = source_tree(tmp_path / "tree", {"cpu/broken.cpp": "int a = nonsense;\n"})
    code, said = setup(tree, "bdist_wheel", environment={"GLOW_KERNELS_BUILD": mode})
    assert "this command failed:" in said
    assert "-c csrc/cpu/broken.cpp" in said
    assert "csrc/cpu/broken.cpp:1:9" in said
    assert "Traceback" not in said
    assert code == (mode == "cpu")
    if mode == "auto":
        assert "WITHOUT its native CPU library" in said
        (wheel,) = (tree / "dist").glob("*.whl")
        assert not [name for name in zipfile.ZipFile(wheel).namelist() if "_C." in name]


@needs_compiler
def test_a_source_that_does_not_compile_ends_the_build_of_the_other_library(tmp_path: Path) -> None:
    sources = {"cpu/broken.cpp": "int a = nonsense;\n", **{f"cuda/{index}.cu": "" for index in range(10)}}
    environment = nvcc_of("13.0", tmp_path) | {"MAX_JOBS": "1"}
    environment.pop("CXX")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f'{nvcc.read_text()}sleep 0.5\nfor last; do true; done\ntouch "$last"\n')
    code, said = setup(source_tree(tmp_path / "tree", sources), "build_ext", "--inplace", environment=environment)
    assert code == 1
    assert "csrc/cpu/broken.cpp:1:9" in said
    # At most one before the broken file, and one more until its error is read.
    assert said.count("compiling csrc/cuda") <= 2
