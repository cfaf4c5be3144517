"""A service that is killed (kill -9) while clients change adapters keeps what it acknowledged, round after round.

`ROOTSTOCK_KILL_ROUNDS` says how many rounds: `make test-kills` runs 100.
"""

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from blake3 import blake3

from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.catalog.catalogs import blob, files, opened, prepared, run

ROOT = Path(__file__).parents[3]
ROUNDS = int(os.environ.get("ROOTSTOCK_KILL_ROUNDS", "2"))
CLIENTS, NAMES, SEEDS = 4, 2, 5  # names of each client; adapters that it chooses from
SECONDS = (0.05, 0.8)  # after which a service is killed
OPTIONS = ("", "?pin=true", "?preload=false")

Digest = str | None  # of a name's adapter; None: there is no such name


class Client(threading.Thread):
    """Changes its names until the service dies; knows for each which states it may be in."""

    def __init__(self, url: str, states: dict[str, set[Digest]], digests: list[str], seed: str) -> None:
        super().__init__()
        self.states, self.changes = states, 0
        self._url, self._digests, self._random = url, digests, random.Random(seed)
        self.wrong: list[str] = []

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=20) as client:
            try:
                while True:
                    self._change(client, self._random.choice(sorted(self.states)))
            except httpx.TransportError:
                return

    def _change(self, client: httpx.Client, name: str) -> None:
        seed = self._random.choice([None, *range(len(self._digests))])
        wanted = None if seed is None else self._digests[seed]
        before = self.states[name]
        self.states[name] = before | {wanted}  # until it is acknowledged
        if seed is None:
            answer = client.delete(f"/adapters/{name}")
            known = {404} if before == {None} else {204}
        else:
            options = self._random.choice(OPTIONS)
            answer = client.put(f"/adapters/{name}{options}", files=multipart(*bundle(seed)))
            known = {200, 201}
        if answer.status_code == 409 and answer.json()["error"]["code"] == "pins_full":
            wanted, known = next(iter(before)), {409}  # nothing has changed
        if answer.status_code not in known:
            self.wrong.append(f"{name}: {answer.status_code} {answer.text}")
        self.states[name] = {wanted}
        self.changes += 1


@contextmanager
def service(model: Path, data: Path) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    command = [sys.executable, "-m", "tests.service.catalog.stormed_service", str(model), str(data)]
    with (
        (data / "log").open("a") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url, (data / "log").read_text()
            yield url, process
        finally:
            process.kill()


def check(url: str, data: Path, states: dict[str, set[Digest]]) -> None:
    """Hold what a new service shows against what clients know, and settle what was open."""
    shown = {each["name"]: each for each in httpx.get(f"{url}/adapters", timeout=20).json()["adapters"]}
    assert shown.keys() <= states.keys()
    for name, allowed in states.items():
        digest = shown[name]["digest"] if name in shown else None
        assert digest in allowed, f"{name} is {digest}, expected one of {allowed}"
        states[name] = {digest}
        if digest is not None:
            assert shown[name]["state"] in ("ready", "loading"), shown[name]
            assert blake3((data / blob(digest)).read_bytes()).hexdigest() == digest


@pytest.fixture
def digests(tmp_path: Path) -> list[str]:
    found = []
    for seed in range(SEEDS):
        staged = tmp_path / f"staged-{seed}"
        staged.mkdir()
        found.append(prepared(staged, seed)[0].digest)
    return found


def test_a_service_that_is_killed_again_and_again_keeps_what_it_acknowledged(
    tiny_model: Path, tmp_path: Path, digests: list[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    known: list[dict[str, set[Digest]]] = [
        {f"client-{client}-{name}": {None} for name in range(NAMES)} for client in range(CLIENTS)
    ]
    changes = 0
    for round in range(ROUNDS + 1):
        with service(tiny_model, data) as (url, process):
            states = {name: allowed for each in known for name, allowed in each.items()}
            check(url, data, states)
            if round == ROUNDS:
                break
            known = [{name: states[name] for name in each} for each in known]
            clients = [Client(url, each, digests, f"{round}:{index}") for index, each in enumerate(known)]
            for client in clients:
                client.start()
            threading.Event().wait(random.Random(round).uniform(*SECONDS))
            process.send_signal(signal.SIGKILL)
            for client in clients:
                client.join()
            assert [wrong for client in clients for wrong in client.wrong] == []
            changes += sum(client.changes for client in clients)
    assert changes >= ROUNDS, "the clients changed too little"
    run(nothing_is_left(data, {name: digest for name, [digest] in states.items()}))


async def nothing_is_left(data: Path, states: dict[str, Digest]) -> None:
    (data / "log").unlink()
    async with opened(data) as catalog:
        await catalog.collect(-1)
        kept = {digest for digest in states.values() if digest is not None}
        names = [f"names/{name}.json" for name, digest in states.items() if digest is not None]
        left = [file for file in files(data) if not file.startswith("cache/")]
        assert left == sorted([*map(blob, kept), *names])
