"""What pyproject.toml cannot say: the native libraries, which are optional.

The environment variable ``GLOW_KERNELS_BUILD`` says which of them to compile:

- ``none``, the default: pure Python, which needs neither a compiler nor torch;
- ``cpu``: ``glow_kernels/_C.so`` for the CPU; the build fails if that cannot be compiled;
- ``cuda``: also ``glow_kernels/_C_cuda.so`` for NVIDIA GPUs, which needs nvcc but neither a GPU nor a torch with CUDA;
- ``auto``: each library that can be compiled; for the others, the build says why not and goes on without.

``CXX`` chooses the compiler, ``CXXFLAGS`` adds options, ``MAX_JOBS`` is the number of compilers that run at once,
``CUDA_HOME`` is where nvcc is, and ``GLOW_KERNELS_CUDA_ARCHS``, for example ``80,90``, the GPUs to compile for. With
``GLOW_KERNELS_ISAS=baseline`` the CPU library has only the kernels that run on every processor, and compiles in a third
of the time. The libraries use no Python symbols and only torch's stable ABI, so that one build serves every Python and
every torch from 2.10 on.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError

MODE = os.environ.get("GLOW_KERNELS_BUILD") or "none"
CSRC = Path("csrc")
OBJECTS = Path("build/native")
LIBRARY, CUDA_LIBRARY = "glow_kernels/_C.so", "glow_kernels/_C_cuda.so"

INCLUDE = "-Icsrc/include -Icsrc -DTORCH_TARGET_VERSION=0x020a000000000000"
COMPILE = (
    "-std=c++17 -O3 -g0 -fPIC -fvisibility=hidden -Wall -Wextra"
    # The parts of fast-math that vectorizing needs, without those that reorder sums or assume that there are no NaNs.
    f" -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd {INCLUDE}"
)
# Undefined symbols are errors now, not when a user loads the library; on macOS the linker does this by default.
LINK = ["-shared"] if sys.platform == "darwin" else ["-shared", "-Wl,--no-undefined"]
# The instruction sets that csrc/cpu/kernels is compiled for, the lowest first: build() needs this order.
ISAS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64") and os.environ.get("GLOW_KERNELS_ISAS") != "baseline":
    ISAS["avx2"] = "-mavx2 -mfma -mf16c"
    ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"

# The GPUs that _C_cuda.so has machine code for; later ones compile the PTX of the last when the library first runs.
CUDA_ARCHS = (80, 86, 89, 90, 100, 120)
# The architectures at which the PTX of our kernels changes; in between only its name differs. So each of these is
# generated only once, which halves the build.
CUDA_GENERATIONS = (80, 90, 100)
OLDEST_NVCC = (12, 8)  # the first that knows the newest of CUDA_ARCHS
CUDA_COMPILE = (
    # -O1 is for the host code only: nvcc has other options for kernels, and optimises them fully by default.
    "-std=c++20 -O1 -Werror all-warnings -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror "
    f"-DUSE_CUDA {INCLUDE}"
)
# The only function of libtorch_cuda that _C_cuda.so calls. A stub library of that name is linked in its place.
CUDA_STUB = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n'
# `make test-cuda-host` compiles the CUDA sources as C++ for the CPU, with threads and barriers from tests/cuda_host.
CUDA_HOST = Path("tests/cuda_host")
CUDA_HOST_COMPILE = (
    f"-std=c++20 -g1 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -fno-strict-aliasing {INCLUDE}"
)


class Toolchain(NamedTuple):
    """The compiler and the torch that a build uses."""

    compiler: list[str]
    compiler_version: str
    torch: Path
    torch_version: str


def find_toolchain() -> Toolchain:
    """Find a compiler and torch, or raise a CompileError that says what is missing and what to do."""
    if sys.platform == "win32":
        raise CompileError("the native library does not build on Windows yet; unset GLOW_KERNELS_BUILD")
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    commands = [shlex.split(name) for name in names]
    compiler = next(([path, *options] for first, *options in commands if (path := shutil.which(first))), None)
    if compiler is None:
        looked_for = ", ".join(names)
        raise CompileError(f"no C++ compiler (looked for {looked_for}); install g++ or clang++, or set CXX to yours")
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise CompileError(
            "no torch where the build runs; if you have torch, add --no-build-isolation to pip's options"
        )
    torch_version = importlib.metadata.version("torch")
    if [int(number) for number in re.findall(r"\d+", torch_version)[:2]] < [2, 10]:
        raise CompileError(f"torch {torch_version} is too old; install torch 2.10 or newer")
    compiler_version = execute([*compiler, "--version"]).splitlines()[0]
    return Toolchain(compiler, compiler_version, Path(torch.origin).parent, torch_version)


class Nvcc(NamedTuple):
    """What a build for NVIDIA GPUs uses in addition."""

    path: str
    version: str
    archs: tuple[int, ...]


def find_nvcc() -> Nvcc:
    """Find nvcc, or raise a CompileError that says what is missing and what to do. No GPU is needed."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc", "nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    path = next((found for name in candidates if (found := shutil.which(name))), None)
    needed = ".".join(map(str, OLDEST_NVCC))
    if path is None:
        looked_for = ", ".join(candidates)
        raise CompileError(
            f"no nvcc (looked for {looked_for}); install the CUDA toolkit {needed} or newer, or set CUDA_HOME"
        )
    version = re.search(r"release (\d+)\.(\d+)", execute([path, "--version"]))
    if version is None or tuple(map(int, version.groups())) < OLDEST_NVCC:
        found = ".".join(version.groups()) if version else "of an unknown version"
        raise CompileError(
            f"nvcc {found} at {path} is too old; install the CUDA toolkit {needed} or newer, or set CUDA_HOME"
        )
    wanted = os.environ.get("GLOW_KERNELS_CUDA_ARCHS") or ",".join(map(str, CUDA_ARCHS))
    archs = re.findall(r"\d+", wanted)
    if not archs or not re.fullmatch(r"\d+([,; ]+\d+)*", wanted):
        raise CompileError(f"GLOW_KERNELS_CUDA_ARCHS must be a list of architectures such as 80,90, got {wanted!r}")
    return Nvcc(path, ".".join(version.groups()), tuple(sorted({int(arch) for arch in archs})))


def build(tools: Toolchain, root: Path, compilers: Executor) -> None:
    """Compile what has changed in the CPU library, and write the library and its description below ``root``."""
    units = [Unit(path, [*COMPILE.split(), *has_isas()]) for path in sorted(CSRC.glob("cpu/*.cpp"))]
    # If several objects define the same inline function, the linker keeps the first. With the lowest ISA first, that is
    # one which runs on every processor.
    units += [
        Unit(path, [*COMPILE.split(), *has_isas(), *flags.split(), f"-DGLOW_KERNELS_ISA={isa}"], isa)
        for isa, flags in ISAS.items()
        for path in sorted(CSRC.glob("cpu/kernels/*.cpp"))
    ]
    link(tools, root / LIBRARY, compile_all(compilers, tools, tools.compiler, units))
    describe(tools, root / LIBRARY, "cpu", isas=list(ISAS))


def build_cuda(tools: Toolchain, nvcc: Nvcc, root: Path, compilers: Executor) -> None:
    """Do the same for the CUDA library."""
    host, *options = tools.compiler
    compiler = [nvcc.path, "-ccbin", host, *(f"-Xcompiler={option}" for option in options)]
    generations = [max((each for each in CUDA_GENERATIONS if each <= arch), default=arch) for arch in nvcc.archs]
    for generation in dict.fromkeys(generations):
        code = [f"sm_{arch}" for arch, its in zip(nvcc.archs, generations, strict=True) if its == generation]
        code += [f"compute_{generation}"] * (generation == generations[-1])
        compiler += ["-gencode", f"arch=compute_{generation},code=[{','.join(code)}]"]
    units = [Unit(path, CUDA_COMPILE.split()) for path in sorted(CSRC.glob("cuda/*.cu"))]
    objects = compile_all(compilers, tools, compiler, units)
    stub = OBJECTS / "libtorch_cuda.so"
    source = stub.with_suffix(".cpp")
    source.write_text(CUDA_STUB)
    produce(stub, [*tools.compiler, "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", str(source)])
    # nvcc links its runtime statically. Its symbols are hidden, so that they cannot clash with another copy's.
    options = ["-Xlinker=--no-undefined", "-Xlinker=--exclude-libs,ALL"]
    produce(
        root / CUDA_LIBRARY, [*compiler, "-shared", *options, *map(str, objects), *torch_libraries(tools), str(stub)]
    )
    describe(tools, root / CUDA_LIBRARY, "cuda", nvcc=nvcc.version, archs=list(nvcc.archs))


def build_cuda_host(tools: Toolchain, root: Path, compilers: Executor) -> None:
    """Build the CUDA sources as a library for the CPU, in place of the CPU library."""
    flags = ["-I", str(CUDA_HOST), *CUDA_HOST_COMPILE.split(), "-x", "c++"]
    sources = [*sorted(CSRC.glob("cuda/*.cu")), *sorted(CUDA_HOST.glob("*.cpp"))]
    units = [Unit(path, flags, "host") for path in sources]
    link(tools, root / LIBRARY, compile_all(compilers, tools, tools.compiler, units))
    describe(tools, root / LIBRARY, "cuda", isas=[])


class Unit(NamedTuple):
    """A source, the flags it is compiled with, and a name that distinguishes units of the same source."""

    source: Path
    flags: list[str]
    variant: str = "any"


def has_isas() -> list[str]:
    """Macros that tell the sources which instruction sets they are compiled for."""
    return [f"-DGLOW_KERNELS_HAS_{name.upper()}" for name in ISAS]


def compile_all(compilers: Executor, tools: Toolchain, compiler: list[str], units: list[Unit]) -> list[Path]:
    """Compile ``units`` in parallel, and return their objects."""
    read = [with_headers(unit.source) for unit in units]
    # Units that read the most compile the longest; they go first, so that none runs alone at the end.
    order = sorted(range(len(units)), key=lambda index: -sum(path.stat().st_size for path in read[index]))
    made = {index: compilers.submit(compile_unit, tools, compiler, read[index], units[index]) for index in order}
    return [made[index].result() for index in range(len(units))]


def with_headers(source: Path) -> list[Path]:
    """Return ``source`` and those of our headers that it includes, directly or indirectly."""
    read = [source]
    for path in read:  # grows in the loop
        for name in re.findall(r'^ *# *include ["<](.+)[">]', path.read_text(), re.MULTILINE):
            headers = (folder / name for folder in (CSRC / "include", CSRC, CUDA_HOST))
            read += [header for header in headers if header.is_file() and header not in read]
    return read


def link(tools: Toolchain, library: Path, objects: list[Path]) -> None:
    """Link ``objects`` with torch into ``library``."""
    produce(library, [*tools.compiler, *LINK, *extra_flags(), *map(str, objects), *torch_libraries(tools)])


def torch_libraries(tools: Toolchain) -> list[str]:
    """Linker options for torch."""
    return [f"-L{tools.torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]


def describe(tools: Toolchain, library: Path, part: str, **built_for: object) -> None:
    """Write a description of what ``library`` was built for and from, beside it."""
    description = {
        "torch": tools.torch_version,
        "compiler": tools.compiler_version,
        "machine": platform.machine(),
        **built_for,
        "csrc": csrc_hash(part),
    }
    library.with_suffix(".json").write_text(json.dumps(description, indent=2) + "\n")


def extra_flags() -> list[str]:
    """Options from ``CXXFLAGS``; of contradictory options the compiler takes the last."""
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def compile_unit(tools: Toolchain, compiler: list[str], read: list[Path], unit: Unit) -> Path:
    """Compile ``unit``, which reads these files, or return the object of an earlier build with identical input."""
    # Torch's headers are system headers, so they give no warnings; the prefix map keeps the folders of this machine out
    # of error messages.
    include = tools.torch / "include"
    of_host = [*extra_flags(), f"-fmacro-prefix-map={include}/="]
    if unit.source.suffix == ".cu" and unit.variant != "host":
        of_host = [f"-Xcompiler={option}" for option in of_host]
    command = [*compiler, *unit.flags, *of_host, "-isystem", str(include), "-c", str(unit.source)]
    key = hashlib.sha256(repr((command, tools, platform.machine())).encode())
    # Builds with other options, for example sanitizers, keep their objects beside these.
    name = ".".join((*unit.source.parts[1:], unit.variant, key.hexdigest()[:8]))
    for path in read:
        key.update(path.read_bytes())
    made = OBJECTS / f"{name}.{key.hexdigest()[:16]}.o"
    if not made.exists():
        for outdated in OBJECTS.glob(f"{name}.*.o"):
            outdated.unlink()
        sys.stderr.write(f"compiling {unit.source}{f' for {unit.variant}' if unit.variant != 'any' else ''}\n")
        produce(made, command)
    return made


def produce(target: Path, command: list[str]) -> None:
    """Let ``command`` write ``target`` atomically, even while a process has the old file open."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        sys.stderr.write(execute([*command, "-o", str(partial)]))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def execute(command: list[str]) -> str:
    """Run ``command`` and return its output; if it fails, raise a CompileError with both."""
    done = subprocess.run(command, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise CompileError(f"this command failed:\n{shlex.join(command)}\n{done.stdout}")
    return done.stdout


def csrc_hash(part: str) -> str:
    """Hash of the sources of a library; glow_kernels/backends/native/library.py computes the same."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("include", part) for path in (CSRC / folder).rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(CSRC).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def say_without(what: str, error: CompileError) -> None:
    """Say that ``auto`` goes on without a library; pip shows this with ``-v``."""
    sys.stderr.write(f"\n*** glow_kernels WITHOUT its native {what}, which could not be built: {error}\n\n")


def build_or_say(what: str, library: Path, build_it: Callable[[], None]) -> None:
    """Build ``library``; if that fails, say why in mode ``auto``, otherwise raise the error."""
    try:
        build_it()
    except CompileError as error:
        if MODE != "auto":
            raise
        say_without(what, error)
        for path in (library, library.with_suffix(".json")):  # an earlier build must not get into this wheel
            path.unlink(missing_ok=True)


class BuildNative(build_ext):
    """Build the libraries when setuptools builds extensions."""

    def run(self) -> None:
        if not self.extensions:
            return
        root = Path("" if self.inplace else self.build_lib)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as compilers:
            if MODE == "cuda-host":
                build_cuda_host(find_toolchain(), root, compilers)
            else:
                self.build_beside_each_other(root, compilers)

    def build_beside_each_other(self, root: Path, compilers: Executor) -> None:
        """Build the libraries in parallel: each has a source that takes half a minute, however many cores there are."""
        wanted = [("CPU library", LIBRARY, lambda: build(find_toolchain(), root, compilers))]
        if MODE != "cpu":
            what = "CUDA library (Triton or the reference computes on GPUs)"
            wanted.append((what, CUDA_LIBRARY, lambda: build_cuda(find_toolchain(), find_nvcc(), root, compilers)))
        with ThreadPoolExecutor() as libraries:
            built = [libraries.submit(build_or_say, what, root / name, build_it) for what, name, build_it in wanted]
            try:
                for each in as_completed(built):
                    each.result()
            except CompileError:
                compilers.shutdown(wait=False, cancel_futures=True)  # the other library is of no use without this one
                raise

    def outputs(self) -> list[str]:
        return [
            name
            for library in (LIBRARY, CUDA_LIBRARY)[: 1 if MODE == "cpu" else 2]
            for name in (library, library[:-2] + "json")
        ]

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, name)) for name in self.outputs()]

    def get_output_mapping(self) -> dict[str, str]:
        return dict(zip(self.get_outputs(), self.outputs(), strict=True)) if self.inplace else {}


class AnyPythonWheel(bdist_wheel):
    """A wheel with the libraries is for one platform, but for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class SourcesToo(sdist):
    """A source distribution that contains csrc, so that it can be installed with ``GLOW_KERNELS_BUILD=cpu``."""

    def make_distribution(self) -> None:
        self.filelist.extend(str(path) for path in CSRC.rglob("*") if path.is_file())
        super().make_distribution()


def extensions() -> list[Extension]:
    """The libraries, if they are to be built; checked early, before pip fetches torch for an isolated build."""
    if MODE not in ("none", "cpu", "cuda", "auto", "cuda-host"):
        raise SystemExit(f"glow_kernels: GLOW_KERNELS_BUILD must be none, cpu, cuda or auto, got {MODE!r}")
    if MODE == "none":
        return []
    try:
        find_toolchain()
        if MODE == "cuda":
            find_nvcc()
    except CompileError as error:
        if MODE != "auto":
            raise SystemExit(f"glow_kernels: GLOW_KERNELS_BUILD={MODE}: {error}") from None
        say_without("CPU library", error)
        return []
    return [Extension("glow_kernels._C", sources=[])]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel, "sdist": SourcesToo},
)
