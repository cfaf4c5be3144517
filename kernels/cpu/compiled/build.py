"""Compiles the C++ kernels for this machine, once, or takes a library that was built in advance.

usage: python -m kernels.cpu.compiled.build DIRECTORY      builds a library for each kind of CPU of this architecture

Only the standard library is needed. A machine without a compiler runs the PyTorch kernels of `kernels.cpu`.
"""

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_log = logging.getLogger(__name__)

HERE = Path(__file__).parent
PREBUILT = HERE / "prebuilt"
MAIN = "program.cpp"
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread"]
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT_SECONDS = 300


class CannotBuild(Exception):
    """There is no library for this machine; the message says why, and what to do."""


class Target(NamedTuple):
    """A kind of CPU that a library can be built for."""

    name: str
    flags: tuple[str, ...]  # of the compiler
    needs: frozenset[str]  # as /proc/cpuinfo names what such a CPU can do


def _features(names: str) -> frozenset[str]:
    return frozenset(names.split())


AVX512 = "avx512f avx512bw avx512cd avx512dq avx512vl"
NATIVE = Target("native", ("-march=native",), frozenset())
# In the order of preference.
PORTABLE = {
    "x86_64": (
        Target(
            "x86-64-v4-bf16",
            ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
            _features(f"{AVX512} avx512_bf16 avx512_vnni"),
        ),
        Target("x86-64-v4", ("-march=x86-64-v4",), _features(AVX512)),
        Target("x86-64-v3", ("-march=x86-64-v3",), _features("avx2 fma f16c bmi1 bmi2")),
    ),
    "aarch64": (Target("armv8-a", ("-march=armv8-a",), frozenset()),),
}


def library() -> Path:
    """The path of a library that runs on this machine, built first if there is none. Raises CannotBuild."""
    prebuilt = next(_prebuilt(PREBUILT), None)
    return _cached() if prebuilt is None else prebuilt


def build(target: Target, path: Path) -> None:
    """Compile the library for a kind of CPU. Raises CannotBuild."""
    compiler = _compiler()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            output = Path(scratch) / path.name
            _run([compiler, *FLAGS, *_native_flags(target), str(HERE / MAIN), "-o", str(output)])
            os.replace(output, path)
    except OSError as error:
        raise CannotBuild(f"{path.parent} takes no files: {error.strerror}; set XDG_CACHE_HOME") from None


def _run(command: Sequence[str]) -> str:
    """What a compiler prints. Raises CannotBuild with its errors."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{command[0]} failed: {error}") from None
    if done.returncode:
        raise CannotBuild(f"{command[0]} failed: {done.stderr.strip()[:2000]}")
    return done.stdout


def _native_flags(target: Target) -> tuple[str, ...]:
    # Clang for Apple's processors has no -march=native.
    if target is NATIVE and platform.machine() == "arm64":
        return ("-mcpu=native",)
    return target.flags


def _prebuilt(directory: Path) -> Iterator[Path]:
    can = _cpu_features()
    for target in PORTABLE.get(platform.machine(), ()):
        path = directory / _file_name(target)
        if target.needs <= can and path.exists():
            yield path


def _cached() -> Path:
    """The library in the user's cache. Several processes that start at once build it once."""
    directory = _cache() / "rootstock" / "kernels"
    path = directory / _file_name(NATIVE, _compiler_version(), platform.machine(), *sorted(_cpu_features()))
    if path.exists():
        return path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("w")
    except OSError as error:
        raise CannotBuild(f"{directory} is not writable: {error.strerror}; set XDG_CACHE_HOME") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _log.info("compiling the CPU kernels for this machine, once; it takes about 25 s")
            started = time.monotonic()
            build(NATIVE, path)
            _log.info("compiled the CPU kernels in %.1f s", time.monotonic() - started)
    return path


def _cache() -> Path:
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(named) if named else Path.home() / ".cache"
    except RuntimeError:
        raise CannotBuild("this user has no home directory to keep the library in: set XDG_CACHE_HOME") from None


def _file_name(target: Target, *more: str) -> str:
    """A name that changes with all that the library depends on."""
    digest = hashlib.sha256()
    for source in sorted([*HERE.glob("*.h"), HERE / MAIN]):
        digest.update(source.read_bytes())
    digest.update(repr((FLAGS, target.flags, more)).encode())
    return f"{target.name}-{digest.hexdigest()[:16]}.so"


def _compiler() -> str:
    named = os.environ.get("CXX")
    for name in (named,) if named else COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    looked = named or ", ".join(COMPILERS)
    raise CannotBuild(f"there is no C++ compiler ({looked}): install g++ or clang, or set CXX")


def _compiler_version() -> str:
    compiler = _compiler()
    return compiler + _run([compiler, "--version"])


def _cpu_features() -> frozenset[str]:
    """What the CPU can do, as Linux names it; elsewhere its name alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset([platform.processor()])
    return frozenset(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())


def main(directory: Path) -> None:
    """Build a library for each kind of CPU of this architecture."""
    for target in PORTABLE.get(platform.machine(), ()):
        path = directory / _file_name(target)
        build(target, path)
        print(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]))
    except CannotBuild as reason:
        sys.exit(str(reason))
