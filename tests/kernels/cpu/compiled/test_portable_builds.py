"""Libraries that are built in advance: which of them is taken, and those of this architecture built for real."""

import contextlib
import hashlib
import itertools
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.cpu.compiled import build, library, panels, program
from kernels.cpu.compiled.build import CannotBuild, Target
from kernels.cpu.compiled.program import Part, Pool, Program
from tests.kernels.cpu.compiled.contexts import Cache, Piece, attend
from tests.kernels.cpu.compiled.fake_compiler import FakeCompiler
from tests.kernels.cpu.compiled.steps import (
    FLOATS,
    TYPES,
    Adapter,
    empty_rows,
    in_panels,
    random,
    random_part,
    rows_of,
    same_bits,
    step_of,
)

ROOT = Path(__file__).parents[4]
BF16, V4, V3 = build.PORTABLE["x86_64"]
BOTH = V3.needs | V4.needs | {"sse2"}


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    return FakeCompiler(tmp_path / "compiler", monkeypatch)


def prebuild(directory: Path, monkeypatch: pytest.MonkeyPatch, *targets: Target) -> dict[Target, Path]:
    """Put a library of each target into the package, for a machine of the architecture of `build.PORTABLE`."""
    monkeypatch.setattr(build, "PREBUILT", directory)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    paths = {target: directory / build._file_name(target) for target in targets}
    for path in paths.values():
        path.write_text("built in advance")
    return paths


def test_the_best_prebuilt_library_that_the_cpu_supports_is_taken(
    compiler: FakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = prebuild(tmp_path, monkeypatch, V3, V4, BF16)
    for features, best in (
        (BOTH | BF16.needs, BF16),
        (BOTH, V4),
        (V3.needs, V3),
        (V3.needs | {"avx512f", "avx512_bf16"}, V3),
        (BOTH - {"avx512vl"}, V3),
    ):
        monkeypatch.setattr(build, "_cpu_features", lambda features=features: features)
        assert build.library() == paths[best]
    assert compiler.calls() == []


def test_the_second_best_is_taken_if_the_best_was_not_built(
    compiler: FakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = prebuild(tmp_path, monkeypatch, V3)
    monkeypatch.setattr(build, "_cpu_features", lambda: BOTH)
    assert build.library() == paths[V3]
    assert compiler.calls() == []


@pytest.mark.parametrize("missing", sorted(V3.needs))
def test_none_is_taken_by_a_cpu_that_lacks_one_instruction(
    compiler: FakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    prebuild(tmp_path, monkeypatch, V3)
    monkeypatch.setattr(build, "_cpu_features", lambda: V3.needs - {missing})
    assert build.library().parent == compiler.libraries
    assert len(compiler.calls()) == 1


def test_none_is_taken_of_another_architecture_or_of_other_sources(
    compiler: FakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prebuild(tmp_path, monkeypatch, V3, V4)
    monkeypatch.setattr(build, "_cpu_features", lambda: BOTH)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert build.library().parent == compiler.libraries
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-g"])
    assert build.library().parent == compiler.libraries


def test_a_prebuilt_library_needs_neither_a_compiler_nor_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = prebuild(tmp_path, monkeypatch, V3)
    monkeypatch.setattr(build, "_cpu_features", lambda: V3.needs)
    monkeypatch.setenv("CXX", "missing-c++")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert build.library() == paths[V3]


def test_the_program_builds_each_portable_target_and_prints_its_path(
    compiler: FakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    build.main(tmp_path / "made")
    printed = capsys.readouterr().out.split()
    assert [Path(path).name.rsplit("-", 1)[0] for path in printed] == ["x86-64-v4-bf16", "x86-64-v4", "x86-64-v3"]
    assert sorted(map(str, (tmp_path / "made").iterdir())) == sorted(printed)
    assert [call.split("-march=")[1].split()[0] for call in compiler.calls()] == ["x86-64-v4", "x86-64-v4", "x86-64-v3"]
    assert ["-mavx512bf16" in call for call in compiler.calls()] == [True, False, False]
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "made")
    monkeypatch.setattr(build, "_cpu_features", lambda: BOTH)
    assert str(build.library()) == printed[1]


def test_the_program_ends_with_its_usage_or_with_what_is_missing(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kernels.cpu.compiled.build", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | {"CXX": "missing-c++"}, capture_output=True, text=True
        )

    usage = run()
    assert usage.returncode == 1
    assert "python -m kernels.cpu.compiled.build DIRECTORY" in usage.stderr
    if platform.machine() in build.PORTABLE:
        failed = run(str(tmp_path))
        assert failed.returncode == 1
        assert failed.stderr == "there is no C++ compiler (missing-c++): install g++ or clang, or set CXX\n"


@pytest.fixture(scope="module")
def built(library: None, kept_builds: Path) -> Path:
    """Every portable target of this architecture, compiled for real: 13 s each, once for a compiler and sources."""
    targets = build.PORTABLE.get(platform.machine())
    if targets is None:
        pytest.skip(f"there are no portable targets for {platform.machine()}")
    try:
        key = repr((build._compiler_version(), [build._file_name(target) for target in targets]))
        directory = kept_builds / f"portable-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        if not directory.exists():
            scratch = Path(tempfile.mkdtemp(dir=kept_builds))
            build.main(scratch)
            with contextlib.suppress(OSError):  # another run has come first
                scratch.rename(directory)
    except CannotBuild as reason:
        pytest.skip(f"the portable targets cannot be built: {reason}")
    return directory


def test_every_portable_target_of_this_architecture_compiles(built: Path) -> None:
    targets = build.PORTABLE[platform.machine()]
    assert {path.name for path in built.iterdir()} == {build._file_name(target) for target in targets}
    assert all(path.read_bytes().startswith(b"\x7fELF") for path in built.iterdir())


SHAPES = list(itertools.product((1, 5, 40), TYPES))


def projections(pool: Pool) -> list[Tensor]:
    """Of each type, with adapters of each dtype, by the library that is loaded now."""
    owners = [Adapter([random_part(131, 87, 20, seed, dtype, bias=True)]) for seed, dtype in enumerate(FLOATS)]
    outs = []
    for rows, type in SHAPES:
        x, out, part = random(rows, 131, seed=50), empty_rows(rows, 87), Part(in_panels(random(87, 131), type), None)
        recorded = Program(pool)
        recorded.linear(rows_of(x), [part], out, 0)
        recorded.run(step_of(rows, [None if row % 4 == 3 else owners[row % 4] for row in range(rows)]))
        outs.append(out)
    return outs


def attentions(pool: Pool) -> list[Tensor]:
    caches = [Cache(2, 20, dtype, 16, (200,)) for dtype in (torch.float32, torch.bfloat16)]
    q = random(9, 2 * 3 * 20)
    return [attend(pool, cache, q, [Piece(cache.contexts[0], 150, 9)], 0.2) for cache in caches]


def test_a_portable_library_projects_with_the_bits_of_the_native_one(
    built: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum across the lanes of a register, as in attention, has another order on another kind of CPU."""
    targets = [target for target in build.PORTABLE[platform.machine()] if target.needs <= build._cpu_features()]
    if not targets:
        pytest.skip("this CPU runs none of the portable targets")
    projected, attended = projections(pool), attentions(pool)
    # Where these differ, so do the bits of bfloat16 and nf4
    by_rounding = {(library.rounds_rows(), library.looks_up_bytes()): projected}
    for target in targets:
        monkeypatch.setattr(library, "library", lambda target=target: built / build._file_name(target))
        functions = library.load.__wrapped__()
        for module in (panels, program):
            monkeypatch.setattr(module, "load", lambda functions=functions: functions)
        rounding = bool(functions.rounds_rows()), bool(functions.looks_up_bytes())
        with contextlib.closing(Pool(2)) as own:
            got = projections(own)
            assert all(map(same_bits, got, by_rounding.setdefault(rounding, got)))
            others = [index for index, (_, type) in enumerate(SHAPES) if type not in (torch.bfloat16, "nf4")]
            assert all(same_bits(got[index], projected[index]) for index in others)
            for context, want in zip(attentions(own), attended, strict=True):
                torch.testing.assert_close(context, want, rtol=2e-6, atol=2e-6)
