"""What pyproject.toml cannot say: the native libraries, which are optional.

The environment variable ``GLOW_KERNELS_BUILD`` says which of them to compile:

- ``none``, the default: pure Python, which needs neither a compiler nor torch;
- ``cpu``: ``glow_kernels/_C.so`` for the CPU, or fail and say why;
- ``cuda``: also ``glow_kernels/_C_cuda.so`` for NVIDIA GPUs, which needs nvcc but no GPU, and no torch that has CUDA;
- ``auto``: each where that works; elsewhere say why not and go on without.

``CXX`` chooses the compiler, ``CXXFLAGS`` adds options, ``MAX_JOBS`` says how many compilers run at once, ``CUDA_HOME``
where nvcc is and ``GLOW_KERNELS_CUDA_ARCHS``, such as ``80,90``, for which GPUs it compiles. With
``GLOW_KERNELS_ISAS=baseline`` the CPU library has none but the kernels for every processor, in a third of the time. The
libraries have no Python symbols and keep to torch's stable ABI, so that one build serves every Python and every torch
from 2.10 on.
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
    # What vectorizing needs of fast-math, without its licence to reorder sums or to assume that NaN never comes.
    f" -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd {INCLUDE}"
)
# An undefined symbol shows now and not when a user loads the library; macOS's linker does that unasked.
LINK = ["-shared"] if sys.platform == "darwin" else ["-shared", "-Wl,--no-undefined"]
# What csrc/cpu/kernels is compiled for, the lowest first: build() needs this order.
ISAS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64") and os.environ.get("GLOW_KERNELS_ISAS") != "baseline":
    ISAS["avx2"] = "-mavx2 -mfma -mf16c"
    ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"

# What _C_cuda.so has machine code for; later GPUs compile the intermediate code of the last at the first start.
CUDA_ARCHS = (80, 86, 89, 90, 100, 120)
# Where the intermediate code of our kernels changes: that of the architectures between is the same but for its name,
# so that each of these is made once, half of the build.
CUDA_GENERATIONS = (80, 90, 100)
OLDEST_NVCC = (12, 8)  # the first that knows the newest of them
CUDA_COMPILE = (
    # -O1 is for what launches kernels: nvcc has other options for the kernels, and optimises them fully without.
    "-std=c++20 -O1 -Werror all-warnings -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror "
    f"-DUSE_CUDA {INCLUDE}"
)
# The only function of libtorch_cuda that _C_cuda.so calls. A library with its name stands in for it at the link.
CUDA_STUB = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n'
# The CUDA sources as C++ for the CPU, with threads and barriers by tests/cuda_host: `make test-cuda-host`.
CUDA_HOST = Path("tests/cuda_host")
CUDA_HOST_COMPILE = (
    f"-std=c++20 -g1 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -fno-strict-aliasing {INCLUDE}"
)


class Toolchain(NamedTuple):
    """What a build uses."""

    compiler: list[str]
    compiler_version: str
    torch: Path
    torch_version: str


def find_toolchain() -> Toolchain:
    """Look for a compiler and torch; a CompileError says what is missing and what to do."""
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
    """What a build for NVIDIA GPUs uses besides."""

    path: str
    version: str
    archs: tuple[int, ...]


def find_nvcc() -> Nvcc:
    """Look for nvcc; a CompileError says what is missing and what to do. Whether there is a GPU does not matter."""
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
    """Compile what changed of the CPU library and write it and its description below ``root``."""
    units = [Unit(path, [*COMPILE.split(), *has_isas()]) for path in sorted(CSRC.glob("cpu/*.cpp"))]
    # Of an inline function that several objects hold, the linker keeps the first. With the lowest ISA first, no
    # instruction that a processor may lack gets into code that every processor runs.
    units += [
        Unit(path, [*COMPILE.split(), *has_isas(), *flags.split(), f"-DGLOW_KERNELS_ISA={isa}"], isa)
        for isa, flags in ISAS.items()
        for path in sorted(CSRC.glob("cpu/kernels/*.cpp"))
    ]
    link(tools, root / LIBRARY, compile_all(compilers, tools, tools.compiler, units))
    describe(tools, root / LIBRARY, "cpu", isas=list(ISAS))


def build_cuda(tools: Toolchain, nvcc: Nvcc, root: Path, compilers: Executor) -> None:
    """The same for the CUDA library."""
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
    # nvcc adds its runtime; without its names, so that any other in the process does not matter.
    options = ["-Xlinker=--no-undefined", "-Xlinker=--exclude-libs,ALL"]
    produce(
        root / CUDA_LIBRARY, [*compiler, "-shared", *options, *map(str, objects), *torch_libraries(tools), str(stub)]
    )
    describe(tools, root / CUDA_LIBRARY, "cuda", nvcc=nvcc.version, archs=list(nvcc.archs))


def build_cuda_host(tools: Toolchain, root: Path, compilers: Executor) -> None:
    """The CUDA sources as a library for the CPU, in the place of the CPU library."""
    flags = ["-I", str(CUDA_HOST), *CUDA_HOST_COMPILE.split(), "-x", "c++"]
    sources = [*sorted(CSRC.glob("cuda/*.cu")), *sorted(CUDA_HOST.glob("*.cpp"))]
    units = [Unit(path, flags, "host") for path in sources]
    link(tools, root / LIBRARY, compile_all(compilers, tools, tools.compiler, units))
    describe(tools, root / LIBRARY, "cuda", isas=[])


class Unit(NamedTuple):
    """A source, the flags it is compiled with, and what tells it from other units of the same source."""

    source: Path
    flags: list[str]
    variant: str = "any"


def has_isas() -> list[str]:
    """Tell the sources what they are compiled for."""
    return [f"-DGLOW_KERNELS_HAS_{name.upper()}" for name in ISAS]


def compile_all(compilers: Executor, tools: Toolchain, compiler: list[str], units: list[Unit]) -> list[Path]:
    """The objects of ``units``."""
    read = [with_headers(unit.source) for unit in units]
    # Those that read most compile longest: with them first, no compiler is left alone with one at the end.
    order = sorted(range(len(units)), key=lambda index: -sum(path.stat().st_size for path in read[index]))
    made = {index: compilers.submit(compile_unit, tools, compiler, read[index], units[index]) for index in order}
    return [made[index].result() for index in range(len(units))]


def with_headers(source: Path) -> list[Path]:
    """``source`` and the headers of ours that it includes, or that these include."""
    read = [source]
    for path in read:  # which grows
        for name in re.findall(r'^ *# *include ["<](.+)[">]', path.read_text(), re.MULTILINE):
            headers = (folder / name for folder in (CSRC / "include", CSRC, CUDA_HOST))
            read += [header for header in headers if header.is_file() and header not in read]
    return read


def link(tools: Toolchain, library: Path, objects: list[Path]) -> None:
    """Make ``library`` of ``objects`` and torch."""
    produce(library, [*tools.compiler, *LINK, *extra_flags(), *map(str, objects), *torch_libraries(tools)])


def torch_libraries(tools: Toolchain) -> list[str]:
    """Options that link torch."""
    return [f"-L{tools.torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]


def describe(tools: Toolchain, library: Path, part: str, **built_for: object) -> None:
    """Write beside ``library`` what it was built for and from."""
    description = {
        "torch": tools.torch_version,
        "compiler": tools.compiler_version,
        "machine": platform.machine(),
        **built_for,
        "csrc": csrc_hash(part),
    }
    library.with_suffix(".json").write_text(json.dumps(description, indent=2) + "\n")


def extra_flags() -> list[str]:
    """Options that the user adds; the compiler lets the last of contrary ones win."""
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def compile_unit(tools: Toolchain, compiler: list[str], read: list[Path], unit: Unit) -> Path:
    """Compile ``unit``, which reads these files, or take the object that an earlier build made of the very same."""
    # As system headers torch's give no warnings; the map keeps this machine's folders out of error messages.
    include = tools.torch / "include"
    of_host = [*extra_flags(), f"-fmacro-prefix-map={include}/="]
    if unit.source.suffix == ".cu" and unit.variant != "host":
        of_host = [f"-Xcompiler={option}" for option in of_host]
    command = [*compiler, *unit.flags, *of_host, "-isystem", str(include), "-c", str(unit.source)]
    key = hashlib.sha256(repr((command, tools, platform.machine())).encode())
    # Builds with other options, such as a sanitizer's, keep their objects beside these.
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
    """Let ``command`` write ``target``, whole or not at all, even where a process has the old one open."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        sys.stderr.write(execute([*command, "-o", str(partial)]))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def execute(command: list[str]) -> str:
    """Run ``command`` and return what it printed; a CompileError shows both."""
    done = subprocess.run(command, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise CompileError(f"this command failed:\n{shlex.join(command)}\n{done.stdout}")
    return done.stdout


def csrc_hash(part: str) -> str:
    """Fingerprint of the sources of a library; glow_kernels/backends/native/library.py computes the same."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("include", part) for path in (CSRC / folder).rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(CSRC).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def say_without(what: str, error: CompileError) -> None:
    """Tell that ``auto`` goes on without a library; pip shows this with ``-v``."""
    sys.stderr.write(f"\n*** glow_kernels WITHOUT its native {what}, which could not be built: {error}\n\n")


def build_or_say(what: str, library: Path, build_it: Callable[[], None]) -> None:
    """Build ``library``; where that does not work, in mode ``auto`` say why, else raise the error."""
    try:
        build_it()
    except CompileError as error:
        if MODE != "auto":
            raise
        say_without(what, error)
        for path in (library, library.with_suffix(".json")):  # of an earlier build, which must not get into this wheel
            path.unlink(missing_ok=True)


class BuildNative(build_ext):
    """Build the libraries when and where setuptools asks for extensions."""

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
        """The libraries asked for: either has a source that takes half a minute, however many cores there are."""
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
                compilers.shutdown(wait=False, cancel_futures=True)  # of the other library, which is lost with this one
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
    """A wheel with the libraries is for one platform and for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class SourcesToo(sdist):
    """A source distribution holds csrc, so that it can be installed with ``GLOW_KERNELS_BUILD=cpu``."""

    def make_distribution(self) -> None:
        self.filelist.extend(str(path) for path in CSRC.rglob("*") if path.is_file())
        super().make_distribution()


def extensions() -> list[Extension]:
    """The libraries, if they are to be built; checked at once, before pip fetches torch for an isolated build."""
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
