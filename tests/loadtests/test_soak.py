"""The soak fails on what grows and on nothing else, and reads what processes hold."""

import asyncio
import math
import os
import random
import threading
from pathlib import Path

import httpx
import pytest

from loadtests.soak import __main__ as soak
from loadtests.soak.judge import Growth, Limit, growth, not_back
from loadtests.soak.processes import children_of, engine_of, held_by
from loadtests.soak.traffic import BETWEEN_PINS, Refused, Traffic
from tests.loadtests.commands import SHAPE, SMALL, cells, run

LIMIT = Limit(per_minute=2.0, in_all=10.0)
NOISE = 8.0  # MB, of memory that an allocator keeps or not from one second to the next


def series(*, per_minute: float = 0.0, seconds: int = 420, shape=lambda second: 0.0) -> list[tuple[float, float]]:
    rng = random.Random(7)
    return [(s, 1000 + per_minute * s / 60 + shape(s) + rng.gauss(0, NOISE)) for s in range(seconds)]


@pytest.mark.parametrize("per_minute", [3.0, 5.0, 100.0])
def test_a_series_that_grows_fails_whatever_its_noise(per_minute: float) -> None:
    found = growth("engine memory, MB", series(per_minute=per_minute), LIMIT)
    assert found.failed
    assert found.per_minute == pytest.approx(per_minute, abs=0.5)
    assert "engine memory, MB grew by" in found.reason
    assert "at most 2 a minute" in found.reason


@pytest.mark.parametrize(
    "shape",
    [
        lambda second: 0.0,
        lambda second: -second / 10,
        lambda second: 40 * math.sin(second / 9),
        lambda second: 300.0 if 200 < second < 260 else 0.0,  # a peak that comes back
        lambda second: 25.0 * (second % 60) / 60,  # a cache that is emptied each minute
    ],
    ids=["flat", "falling", "waves", "a peak", "saw teeth"],
)
def test_what_is_flat_passes_however_noisy(shape) -> None:
    assert not growth("engine memory, MB", series(shape=shape), LIMIT).failed


def test_growth_that_is_small_or_was_seen_for_a_short_time_is_none() -> None:
    def rising(seconds: int, per_second: float) -> Growth:
        return growth("engine memory, MB", [(second, 1000 + per_second * second) for second in range(seconds)], LIMIT)

    assert rising(100, 0.2).verdict == "grew"
    assert rising(100, 0.1).verdict == "flat"
    assert rising(50, 100.0).verdict == "too short to judge"
    assert not rising(50, 100.0).failed


def test_each_series_with_a_limit_is_judged_after_the_warm_up_only() -> None:
    def sample(second: int) -> dict[str, float]:
        steady = dict.fromkeys(soak.LIMITS, 50.0)
        return steady | {"service descriptors": 50.0 + second, "engine memory, MB": 50.0 + 30 * min(second, 60)}

    found = soak.judged([(second, sample(second)) for second in range(180)], warm_up=60)
    assert [each.name for each in found] == list(soak.LIMITS)
    assert [each.name for each in found if each.failed] == ["service descriptors"]


def test_what_is_left_at_rest_is_named() -> None:
    before = {"requests running": 0.0, "host adapters": 2.0, "device adapters": 1.0}
    assert not_back(before, {"requests running": 0.0, "host adapters": 1.0, "device adapters": 1.0}) == []
    left = not_back(before, {"requests running": 1.0, "host adapters": 2.0, "device adapters": 4.0})
    assert left == ["requests running is 1 at rest, and was 0", "device adapters is 4 at rest, and was 1"]


def test_what_a_process_holds_is_counted() -> None:
    before = held_by(os.getpid())
    kept = bytearray(b"x") * (64 << 20)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    with open(os.devnull) as _:
        after = held_by(os.getpid())
    stop.set()
    thread.join()
    assert after.memory - before.memory == pytest.approx(len(kept) / 1e6, abs=16)
    assert after.threads == before.threads + 1
    assert after.descriptors == before.descriptors + 1
    assert engine_of(os.getpid()) is None
    assert os.getpid() in children_of(os.getppid())


@pytest.mark.parametrize(
    ("status", "error", "raced"),
    [
        (409, {"code": "adapter_pinned", "message": "adapter x is pinned in device memory"}, True),
        (503, {"code": "adapter_failed", "message": f"the pinned adapters leave too little {BETWEEN_PINS}"}, True),
        (503, {"code": "adapter_failed", "message": "its file is damaged"}, False),
        (500, {"code": "internal_error", "message": "the server could not answer"}, False),
    ],
)
def test_only_what_other_clients_explain_is_a_race(status: int, error: dict[str, str], raced: bool) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, json={"error": error}, request=request)

    async def ask(traffic: Traffic) -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://server") as client:
            await traffic._call(client, "DELETE", "/adapters/x")

    traffic = Traffic("http://server", SHAPE, {}, seed=0)
    if raced:
        asyncio.run(ask(traffic))
        assert traffic.done == {"race": 1}
    else:
        with pytest.raises(Refused, match=error["message"]):
            asyncio.run(ask(traffic))


def test_a_short_soak_of_a_tiny_model_does_everything_and_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """With a key, which everything has to send, and nothing says."""
    samples = tmp_path / "samples"
    little = [*SMALL, "--adapter-bytes", "160K", "--host-adapter-bytes", "400K"]
    short = ["--seconds", "5", "--warm-up", "1", "--clients", "4", "--samples", str(samples)]
    server = f"--server-args={' '.join(little)}"
    ended = run("-m", "loadtests.soak", "--model", str(tiny_model), *short, server, LOAD_API_KEY="of-the-soak")
    assert ended.returncode == 0, ended.stderr
    assert "of-the-soak" not in ended.stdout + ended.stderr + samples.read_text()
    _, *rows = cells(ended.stdout.strip())
    assert [row[0] for row in rows] == list(soak.LIMITS)
    assert {row[-1] for row in rows} == {"too short to judge"}
    assert len(samples.read_text().splitlines()) >= 4
    for kind in soak.KINDS:
        assert f" × {kind}" in ended.stderr, f"no {kind} was done"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--kinds", "base,nothing"], "no kind of traffic 'nothing'"),
        (["--seconds", "5", "--warm-up", "5"], "--warm-up must leave some"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        soak.options(argv)
    assert words in capsys.readouterr().err
