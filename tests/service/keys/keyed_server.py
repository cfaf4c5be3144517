"""A service with a file of keys, and clients that have one of them each."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from service.keys.keys_file import KeyRecord, hash_of, new_key, write_keys
from tests.openapi.contract_hook import HOOKS
from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.live_server import LiveServer, fake_settings, live_server


def record(id: str, key: str, **fields: Any) -> KeyRecord:
    given = {"scopes": ["generate"], "created_at": time.time(), **fields}
    return KeyRecord(id=id, hash=hash_of(key), **given)


class Client(httpx.Client):
    """A client with a key, whose answers are held against the contract."""

    def __init__(self, url: str, key: str) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        super().__init__(base_url=url, timeout=20, headers=headers, event_hooks=HOOKS, verify=False)
        self.key = key

    def upload(self, name: str, seed: int = 0, **query: Any) -> httpx.Response:
        return self.put(f"/adapters/{name}", files=multipart(*bundle(seed)), params=query)

    def complete(self, prompt: object = "hello", **body: object) -> httpx.Response:
        return self.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 3, **body})


class Keyed:
    """A running service and its clients by the ids of their keys."""

    def __init__(self, live: LiveServer, file: Path, clients: dict[str, Client]) -> None:
        self.live, self.file, self._clients = live, file, clients

    def __getitem__(self, id: str) -> Client:
        return self._clients[id]


@contextmanager
def keyed_server(model: Path, data: Path, keys: dict[str, dict[str, Any]], **settings: Any) -> Iterator[Keyed]:
    """A service on the fake engine with a key of each id; its fields are those of the record."""
    secrets, file = {id: new_key(id) for id in keys}, data / "keys.json"
    write_keys(file, [record(id, secrets[id], **fields) for id, fields in keys.items()])
    started = fake_settings(model, data / "store", keys_file=file, **settings)
    with live_server(started) as live, ExitStack() as clients:
        of = {id: clients.enter_context(Client(live.url, secret)) for id, secret in secrets.items()}
        yield Keyed(live, file, of)


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]
