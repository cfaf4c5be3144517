"""Quotas: bytes of what a key has uploaded and pinned, in the records of names, across restarts and servers."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.adapters.adapter_bundles import bundle
from tests.service.keys.keyed_server import Client, Keyed, keyed_server, refusal
from tests.service.live_server import fake_settings, live_server, wait_until

SIZE = 600  # bytes of the canonical file of `bundle`; held equal below
KEYS = {
    "small": {"scopes": ["manage"], "disk_bytes": 2 * SIZE, "pinned_bytes": SIZE},
    "other": {"scopes": ["manage"], "disk_bytes": 2 * SIZE},
    "free": {"scopes": ["manage", "generate"]},
}


@pytest.fixture
def server(tiny_model: Path, tmp_path: Path) -> Iterator[Keyed]:
    with keyed_server(tiny_model, tmp_path, KEYS) as keyed:
        yield keyed
        keyed.live.services.catalog.quotas.check()


def test_uploads_fill_the_quota_and_deleting_makes_room(server: Keyed) -> None:
    small = server["small"]
    assert small.upload("a", 1).json()["bytes"] == SIZE
    assert small.upload("b", 2, ephemeral=True).status_code == 201
    answer = small.upload("c", 3)
    assert refusal(answer) == (403, "disk_quota_exceeded")
    assert f"its quota is {2 * SIZE}" in answer.json()["error"]["message"]
    assert small.upload("a", 4).status_code == 200, "a name that is replaced gives its room"
    assert server["other"].upload("c", 3).status_code == 201, "quotas are a key's own"
    assert small.delete("/adapters/b").status_code == 204
    assert small.upload("d", 3).status_code == 201


def test_names_of_one_content_take_its_room_once(server: Keyed) -> None:
    small = server["small"]
    assert [small.upload(name, 1).status_code for name in ("a", "b", "c")] == [201] * 3
    assert [small.upload(name, seed).status_code for name, seed in (("d", 2), ("e", 3))] == [201, 403]


def test_whoever_uploads_a_name_anew_pays_for_it(server: Keyed) -> None:
    small, other = server["small"], server["other"]
    assert [small.upload(name, seed).status_code for name, seed in (("a", 1), ("b", 2))] == [201, 201]
    assert other.upload("a", 1).status_code == 200  # the same content
    assert small.upload("c", 3).status_code == 201
    assert [other.upload(name, seed).status_code for name, seed in (("d", 4), ("e", 5))] == [201, 403]


def test_uploads_at_one_time_count_each_other(server: Keyed) -> None:
    answers: list[int] = []

    def upload(number: int) -> None:
        with Client(server.live.url, server["small"].key) as client:
            answers.append(client.upload(f"at-once-{number}", number).status_code)

    threads = [threading.Thread(target=upload, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(answers) == [201, 201, 403, 403, 403]
    assert len(server["small"].get("/adapters").json()["adapters"]) == 2


def test_imports_count_too(tiny_model: Path, tmp_path: Path) -> None:
    config, weights = bundle(9)
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "adapter_config.json").write_bytes(config)
    (tmp_path / "sources" / "adapter_model.safetensors").write_bytes(weights)
    source = f"file://{tmp_path / 'sources'}"
    keys = {"small": {"scopes": ["manage"], "disk_bytes": SIZE - 1}}
    with keyed_server(tiny_model, tmp_path, keys, allowed_sources=(source,)) as server:
        small = server["small"]
        assert refusal(small.post("/adapters", json={"name": "a", "src": source})) == (403, "disk_quota_exceeded")
        load = {"lora_name": "a", "lora_path": source}
        assert refusal(small.post("/v1/load_lora_adapter", json=load)) == (403, "disk_quota_exceeded")
        assert refusal(small.post("/load_lora_adapter", json=load)) == (403, "disk_quota_exceeded")
        assert small.get("/adapters").json() == {"adapters": []}


def test_pins_have_a_quota_of_their_own(server: Keyed) -> None:
    small, free = server["small"], server["free"]
    for name, seed in (("a", 1), ("b", 2)):
        assert free.upload(name, seed).status_code == 201
    assert small.patch("/adapters/a", json={"pinned": True}).status_code == 200
    for refused in (
        small.patch("/adapters/b", json={"pinned": True}),
        small.post("/adapters/b/load", json={"tier": "host", "pin": True}),
        small.upload("c", 3, pin=True),
    ):
        assert refusal(refused) == (403, "pinned_quota_exceeded")
    assert refusal(small.get("/adapters/c")) == (404, "adapter_not_found")
    assert small.patch("/adapters/a", json={"pinned": True}).status_code == 200, "it is pinned already"
    assert small.patch("/adapters/a", json={"pinned": False}).status_code == 200
    assert small.patch("/adapters/b", json={"pinned": True}).status_code == 200


def test_a_quota_that_was_lowered_refuses_more_and_not_less(tiny_model: Path, tmp_path: Path) -> None:
    with keyed_server(tiny_model, tmp_path, KEYS) as server:
        small = server["small"]
        assert small.upload("a", 1, pin=True).status_code == small.upload("b", 2).status_code == 201
    lowered = {"small": {"scopes": ["manage"], "disk_bytes": SIZE, "pinned_bytes": 0}}
    with keyed_server(tiny_model, tmp_path, lowered) as server:
        small = server["small"]
        assert small.patch("/adapters/a", json={"pinned": True}).status_code == 200, "it was granted before"
        assert refusal(small.upload("c", 3)) == (403, "disk_quota_exceeded")
        assert small.upload("b", 2).status_code == 200, "the same once more"
        assert small.patch("/adapters/a", json={"pinned": False}).status_code == 200
        assert refusal(small.patch("/adapters/a", json={"pinned": True})) == (403, "pinned_quota_exceeded")


def test_quotas_hold_after_a_restart_and_for_what_another_server_of_the_store_took(
    tiny_model: Path, tmp_path: Path
) -> None:
    with keyed_server(tiny_model, tmp_path, KEYS) as server:
        assert server["small"].upload("a", 1).status_code == 201
    with keyed_server(tiny_model, tmp_path, KEYS, refresh_seconds=0.05) as server:
        small = server["small"]
        settings = fake_settings(tiny_model, tmp_path / "store", keys_file=server.file, refresh_seconds=0.05)
        with live_server(settings) as second, Client(second.url, small.key) as elsewhere:
            assert elsewhere.upload("b", 2).status_code == 201
            wait_until(lambda: len(small.get("/adapters").json()["adapters"]) == 2)
            for client in (small, elsewhere):
                assert refusal(client.upload("c", 3)) == (403, "disk_quota_exceeded")


def test_a_full_quota_is_told_before_the_bytes_are_read(server: Keyed) -> None:
    small = server["small"]
    assert [small.upload(name, seed).status_code for name, seed in (("a", 1), ("b", 2))] == [201, 201]

    head = f"PUT /adapters/c HTTP/1.1\r\nhost: here\r\nauthorization: Bearer {small.key}\r\n"
    head += "content-type: application/x-tar\r\ncontent-length: 1000000\r\n\r\n"
    with server.live.connect(head.encode() + b"begun") as connection:
        assert b" 403 " in connection.recv(4096).split(b"\r\n")[0]
