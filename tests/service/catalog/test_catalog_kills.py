"""A kill -9 at any step loses nothing that was acknowledged and shows nothing that was not whole."""

import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3

from tests.service.catalog.catalogs import blob, files, opened, publish, run

ROOT = Path(__file__).parents[3]
FEWEST_STEPS = 15  # an operation with fewer than these has not been taken apart


def prepare(base: Path) -> None:
    """A store with a name, and a file that no name points at."""

    async def program() -> None:
        async with opened(base) as catalog:
            await publish(catalog, "first", seed=9)
            await publish(catalog, "first", seed=0)

    run(program())


def kill(operation: str, directory: Path) -> int:
    prepare(directory / "base")
    (directory / "killed").mkdir()
    command = [
        sys.executable,
        "-m",
        "tests.service.catalog.killed_catalog",
        operation,
        directory / "base",
        directory / "killed",
    ]
    finished = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return int(finished.stdout)


# What is shown before and after each operation: generation and whether pinned, by name
FIRST = {"first": (2, False)}
OUTCOMES = {
    "upload": FIRST | {"second": (1, False)},
    "replace": {"first": (3, True)},
    "ephemeral": FIRST,
    "pin": {"first": (2, True)},
    "delete": {},
    "collect": FIRST,
}


@pytest.mark.parametrize("operation", OUTCOMES)
def test_a_kill_at_any_step_shows_all_or_nothing_and_is_cleaned_up(tmp_path: Path, operation: str) -> None:
    steps = kill(operation, tmp_path)
    assert steps >= FEWEST_STEPS
    seen = []

    async def look(directory: Path, done: bool) -> None:
        async with opened(directory) as catalog:
            shown = {v.name: (v.generation, v.record.pinned) for v in catalog.versions.list()}
            assert shown in ([OUTCOMES[operation]] if done else [FIRST, OUTCOMES[operation]])
            seen.append(shown)
            for version in catalog.versions.list():
                content = (directory / blob(version.digest)).read_bytes()
                assert blake3(content).hexdigest() == version.digest
            await catalog.collect(-1)
            names = [f"names/{version.name}.json" for version in catalog.versions.list()]
            assert files(directory) == sorted([*(blob(version.digest) for version in catalog.versions.list()), *names])
            assert [path.name for path in catalog.blobs._memory.path.parent.iterdir() if path.is_file()] == []

    for step in range(steps + 1):
        done = (tmp_path / "killed" / f"{step}.done").exists()
        run(look(tmp_path / "killed" / str(step), done))
    assert done, "the last one was not killed"
    assert seen[0] == FIRST
    assert seen[-1] == OUTCOMES[operation]
