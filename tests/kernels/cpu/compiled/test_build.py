"""The compiled library: when it is built, under which name, and what is said if it cannot be."""

import errno
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels.cpu.compiled import build
from kernels.cpu.compiled.build import CannotBuild
from kernels.cpu.compiled.library import load
from tests.kernels.cpu.compiled.fake_compiler import FakeCompiler

ROOT = Path(__file__).parents[4]
PROGRAM = """
from pathlib import Path
from kernels.cpu.compiled import build
build.PREBUILT = Path("none")
print(build.library())
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    return FakeCompiler(tmp_path / "compiler", monkeypatch)


def test_a_library_is_compiled_once_and_then_taken_from_the_cache(compiler: FakeCompiler) -> None:
    path = build.library()
    assert path.parent == compiler.libraries
    assert path.read_text() == "a library"
    assert build.library() == path
    (call,) = compiler.calls()
    assert "-march=native" in call or "-mcpu=native" in call
    assert "-std=c++20" in call
    assert compiler.names() == {path.name}


def test_the_cache_is_in_the_home_directory_where_none_is_named(
    compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for unnamed in (lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""), lambda: monkeypatch.delenv("XDG_CACHE_HOME")):
        unnamed()
        monkeypatch.setenv("HOME", str(tmp_path))
        assert build.library().parent == tmp_path / ".cache" / "rootstock" / "kernels"


def test_without_a_compiler_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCompiler(tmp_path / "unused", monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX")
    with pytest.raises(CannotBuild) as error:
        build.library()
    advice = "install g++ or clang, or set CXX"
    assert str(error.value) == f"there is no C++ compiler (c++, g++, clang++): {advice}"
    monkeypatch.setenv("CXX", "my-c++")
    with pytest.raises(CannotBuild) as error:
        build.library()
    assert str(error.value) == f"there is no C++ compiler (my-c++): {advice}"


@pytest.mark.parametrize("name", build.COMPILERS)
def test_each_known_compiler_is_found_on_the_path(
    compiler: FakeCompiler, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(compiler.path, tmp_path / name)
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.library().exists()
    assert len(compiler.calls()) == 1


def test_the_error_of_a_compiler_is_told_and_the_next_start_tries_again(compiler: FakeCompiler) -> None:
    compiler.behave("echo half > $output; echo 'program.cpp:7: no such instruction' >&2; exit 1")
    for attempt in (1, 2):
        with pytest.raises(CannotBuild, match=r"fake-c\+\+ failed: program.cpp:7: no such instruction"):
            build.library()
        assert len(compiler.calls()) == attempt
        assert compiler.names() == set()
    compiler.behave()
    assert build.library().read_text() == "a library"


def test_a_compiler_that_does_not_end_is_given_up(compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "TIMEOUT_SECONDS", 0.2)
    compiler.behave("exec sleep 30")
    with pytest.raises(CannotBuild, match=r"fake-c\+\+ failed: .* timed out"):
        build.library()
    assert compiler.names() == set()


def test_a_compiler_that_cannot_be_started_is_told(compiler: FakeCompiler) -> None:
    compiler.path.write_text("#!/no/such/shell\n")
    with pytest.raises(CannotBuild, match=r"fake-c\+\+ failed: .*No such file"):
        build.library()


def test_processes_that_start_at_once_build_once(compiler: FakeCompiler) -> None:
    compiler.behave("sleep 0.3")
    command = [sys.executable, "-c", PROGRAM]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {process.communicate()[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    (path,) = printed
    assert len(compiler.calls()) == 1
    assert compiler.names() == {Path(path).name}


def test_threads_that_start_at_once_build_once(compiler: FakeCompiler) -> None:
    compiler.behave("sleep 0.1")
    together = threading.Barrier(4)

    def start(_: int) -> Path:
        together.wait()
        return build.library()

    with ThreadPoolExecutor(4) as threads:
        paths = set(threads.map(start, range(4)))
    assert len(compiler.calls()) == 1
    assert compiler.names() == {path.name for path in paths}
    assert len(paths) == 1


def test_who_waits_for_a_build_that_fails_tries_it_too(compiler: FakeCompiler, tmp_path: Path) -> None:
    once = tmp_path / "once"
    compiler.behave(f"sleep 0.1; if mkdir {once} 2>/dev/null; then exit 1; fi")

    def start(_: int) -> Path | None:
        try:
            return build.library()
        except CannotBuild:
            return None

    with ThreadPoolExecutor(2) as threads:
        paths = list(threads.map(start, range(2)))
    assert sorted(path is None for path in paths) == [False, True]
    assert len(compiler.names()) == 1


def changed_version(compiler: FakeCompiler, _: pytest.MonkeyPatch, __: Path) -> None:
    compiler.set_version("fake 1.1")


def another_compiler(compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setenv("CXX", str(shutil.copy(compiler.path, directory / "other-c++")))


def changed_header(_: FakeCompiler, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    _copy(monkeypatch, directory, "vec.h")


def changed_program(_: FakeCompiler, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    _copy(monkeypatch, directory, build.MAIN)


def changed_flags(_: FakeCompiler, monkeypatch: pytest.MonkeyPatch, __: Path) -> None:
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-g"])


def another_cpu(_: FakeCompiler, monkeypatch: pytest.MonkeyPatch, __: Path) -> None:
    monkeypatch.setattr(build, "_cpu_features", lambda: frozenset(["sse2"]))


def another_machine(_: FakeCompiler, monkeypatch: pytest.MonkeyPatch, __: Path) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")


def _copy(monkeypatch: pytest.MonkeyPatch, directory: Path, changed: str) -> None:
    sources = shutil.copytree(build.HERE, directory / "sources", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    with (sources / changed).open("a") as file:
        file.write("// changed\n")
    monkeypatch.setattr(build, "HERE", sources)


CHANGES = (
    changed_version,
    another_compiler,
    changed_header,
    changed_program,
    changed_flags,
    another_cpu,
    another_machine,
)


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_a_library_has_another_name_after(
    compiler: FakeCompiler,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    change: Callable[[FakeCompiler, pytest.MonkeyPatch, Path], None],
) -> None:
    before = build.library()
    compiler.set_output("another library")
    change(compiler, monkeypatch, tmp_path)
    after = build.library()
    assert after != before
    assert (before.read_text(), after.read_text()) == ("a library", "another library")
    assert len(compiler.calls()) == 2


def test_a_copy_of_the_same_sources_has_the_same_name(
    compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = build.library()
    sources = shutil.copytree(build.HERE, tmp_path / "sources", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    monkeypatch.setattr(build, "HERE", sources)
    assert build.library() == before


def test_an_unusable_cache_directory_is_named(compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.cache.write_text("a file")
    with pytest.raises(CannotBuild) as error:
        build.library()
    assert str(error.value) == f"{compiler.libraries} is not writable: Not a directory; set XDG_CACHE_HOME"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every directory")
def test_an_unwritable_cache_directory_is_named(compiler: FakeCompiler) -> None:
    compiler.cache.mkdir(mode=0o500)
    with pytest.raises(CannotBuild) as error:
        build.library()
    assert str(error.value) == f"{compiler.libraries} is not writable: Permission denied; set XDG_CACHE_HOME"


def test_a_cache_directory_that_takes_no_scratch_files_is_named(
    compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk opens the lock that is there already, and makes no directory."""

    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    with pytest.raises(CannotBuild, match=str(compiler.libraries)):
        build.library()


def test_without_a_home_directory_the_error_says_so(compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError("no such user")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(CannotBuild, match="XDG_CACHE_HOME"):
        build.library()


def test_a_library_that_cannot_be_loaded_is_no_library(compiler: FakeCompiler) -> None:
    """A directory whose files may not be executed, or a library of another system."""
    with pytest.raises(CannotBuild):
        load.__wrapped__()
