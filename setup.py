"""What pyproject.toml cannot say: the native CPU library ``glow_kernels/_C.so``, which is optional.

The environment variable ``GLOW_KERNELS_BUILD`` says whether to compile it:

- ``none``, the default: pure Python, which needs neither a compiler nor torch;
- ``cpu``: compile it, or fail and say why;
- ``auto``: compile it where that works; elsewhere say why not and install pure Python.

``CXX`` chooses the compiler, ``CXXFLAGS`` adds options, ``MAX_JOBS`` says how many compilers run at once. The library
has no Python symbols and keeps to torch's stable ABI, so that one build serves every Python and every torch from 2.10
on.
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
from concurrent.futures import ThreadPoolExecutor
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
LIBRARY, DESCRIPTION = "glow_kernels/_C.so", "glow_kernels/_C.json"

COMPILE = (
    "-std=c++17 -O3 -g0 -fPIC -fvisibility=hidden -Wall -Wextra"
    # What vectorizing needs of fast-math, without its licence to reorder sums or to assume that NaN never comes.
    " -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd"
    " -Icsrc/include -Icsrc -DTORCH_TARGET_VERSION=0x020a000000000000"
)
# An undefined symbol shows now and not when a user loads the library; macOS's linker does that unasked.
LINK = ["-shared"] if sys.platform == "darwin" else ["-shared", "-Wl,--no-undefined"]
# What csrc/cpu/kernels is compiled for, the lowest first: build() needs this order.
ISAS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = "-mavx2 -mfma -mf16c"
    ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"


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


def build(tools: Toolchain, root: Path) -> None:
    """Compile what changed and write the library and its description below ``root``."""
    description = {
        "torch": tools.torch_version,
        "compiler": tools.compiler_version,
        "machine": platform.machine(),
        "isas": list(ISAS),
        "csrc": csrc_hash(),
    }
    units: list[tuple[Path, str | None]] = [(path, None) for path in sorted(CSRC.glob("cpu/*.cpp"))]
    # Of an inline function that several objects hold, the linker keeps the first. With the lowest ISA first, no
    # instruction that a processor may lack gets into code that every processor runs.
    units += [(path, isa) for isa in ISAS for path in sorted(CSRC.glob("cpu/kernels/*.cpp"))]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(lambda unit: compile_unit(tools, *unit), units))
    libraries = [f"-L{tools.torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    produce(root / LIBRARY, [*tools.compiler, *LINK, *extra_flags(), *map(str, objects), *libraries])
    (root / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def extra_flags() -> list[str]:
    """Options that the user adds; the compiler lets the last of contrary ones win."""
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def compile_unit(tools: Toolchain, source: Path, isa: str | None) -> Path:
    """Compile ``source``, or take the object that an earlier build made of the very same."""
    command = [
        *tools.compiler,
        *COMPILE.split(),
        *extra_flags(),
        *(f"-DGLOW_KERNELS_HAS_{name.upper()}" for name in ISAS),
    ]
    if isa is not None:
        command += [*ISAS[isa].split(), f"-DGLOW_KERNELS_ISA={isa}"]
    # As system headers torch's give no warnings; the map keeps this machine's folders out of error messages.
    include = tools.torch / "include"
    command += ["-isystem", str(include), f"-fmacro-prefix-map={include}/=", "-c", str(source)]
    key = hashlib.sha256(repr((command, tools, platform.machine())).encode())
    for path in (source, *sorted(CSRC.rglob("*.h"))):
        key.update(path.read_bytes())
    name = ".".join((*source.parts[1:], isa or "any"))
    made = OBJECTS / f"{name}.{key.hexdigest()[:16]}.o"
    if not made.exists():
        for outdated in OBJECTS.glob(f"{name}.*.o"):
            outdated.unlink()
        sys.stderr.write(f"compiling {source}{f' for {isa}' if isa else ''}\n")
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


def csrc_hash() -> str:
    """Fingerprint of the C++ sources; glow_kernels/backends/native/__init__.py computes the same."""
    digest = hashlib.sha256()
    for path in sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp")):
        digest.update(f"{path.relative_to(CSRC).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def say_without(error: CompileError) -> None:
    """Tell that ``auto`` goes on without the library; pip shows this with ``-v``."""
    sys.stderr.write(f"\n*** glow_kernels WITHOUT its native CPU library, which could not be built: {error}\n\n")


class BuildNative(build_ext):
    """Build the library when and where setuptools asks for extensions."""

    def run(self) -> None:
        if not self.extensions:
            return
        root = Path("" if self.inplace else self.build_lib)
        try:
            build(find_toolchain(), root)
        except CompileError as error:
            if MODE != "auto":
                raise
            say_without(error)
            for name in (LIBRARY, DESCRIPTION):  # of an earlier build, which must not get into this wheel
                (root / name).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, name)) for name in (LIBRARY, DESCRIPTION)]

    def get_output_mapping(self) -> dict[str, str]:
        return dict(zip(self.get_outputs(), (LIBRARY, DESCRIPTION), strict=True)) if self.inplace else {}


class AnyPythonWheel(bdist_wheel):
    """A wheel with the library is for one platform and for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class SourcesToo(sdist):
    """A source distribution holds csrc, so that it can be installed with ``GLOW_KERNELS_BUILD=cpu``."""

    def make_distribution(self) -> None:
        self.filelist.extend(str(path) for path in CSRC.rglob("*") if path.is_file())
        super().make_distribution()


def extensions() -> list[Extension]:
    """The library, if it is to be built; checked at once, before pip fetches torch for an isolated build."""
    if MODE == "cuda":
        raise SystemExit("glow_kernels: GLOW_KERNELS_BUILD=cuda: this version has no CUDA sources; use cpu or auto")
    if MODE not in ("none", "cpu", "auto"):
        raise SystemExit(f"glow_kernels: GLOW_KERNELS_BUILD must be none, cpu or auto, got {MODE!r}")
    if MODE == "none":
        return []
    try:
        find_toolchain()
    except CompileError as error:
        if MODE == "cpu":
            raise SystemExit(f"glow_kernels: GLOW_KERNELS_BUILD=cpu: {error}") from None
        say_without(error)
        return []
    return [Extension("glow_kernels._C", sources=[])]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel, "sdist": SourcesToo},
)
