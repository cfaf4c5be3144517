"""Threads for the compiled kernels; where these cannot be built, tests that need them are skipped with the reason."""

from collections.abc import Iterator

import pytest

from kernels.cpu.compiled.build import CannotBuild
from kernels.cpu.compiled.library import load
from kernels.cpu.compiled.program import Pool


@pytest.fixture(scope="session")
def library() -> None:
    try:
        load()
    except CannotBuild as reason:
        pytest.skip(f"the compiled kernels cannot be built: {reason}")


@pytest.fixture(scope="session")
def pools(library: None) -> Iterator[list[Pool]]:
    """Pools of one, two and three threads."""
    pools = [Pool(threads) for threads in (1, 2, 3)]
    yield pools
    for pool in pools:
        pool.close()


@pytest.fixture(scope="session")
def pool(pools: list[Pool]) -> Pool:
    return pools[1]
