"""Names of several words, as other registries write them: in paths, bodies, the store and metrics."""

from pathlib import Path
from urllib.parse import quote

import pytest

from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.adapters.adapter_service import error, serving
from tests.service.live_server import LiveServer, fake_settings, live_server

NAMES = ["org/name", "model@7", "team:poet", "a/b@c:d", "org/load", "org/name/unload", "plain"]


@pytest.mark.parametrize("encode", [lambda name: name, lambda name: quote(name, safe="")], ids=["as it is", "encoded"])
def test_a_name_is_one_in_paths_however_it_is_written(tmp_path: Path, encode: object) -> None:
    assert callable(encode)
    with serving(tmp_path) as service:
        for seed, name in enumerate(NAMES):
            path = f"/adapters/{encode(name)}"
            created = service.client.put(path, files=multipart(*bundle(seed)))
            assert (created.status_code, created.json()["name"]) == (201, name)
            assert service.client.get(path).json() == service.get(quote(name, safe=""))
            assert service.client.patch(path, json={"pinned": True}).json()["pinned"] is True
            assert service.client.patch(path, json={"pinned": False}).json()["pinned"] is False
            assert service.client.post(f"{path}/load", json={"tier": "host"}).status_code == 200
            assert service.client.post(f"{path}/unload", json={"tier": "host"}).json()["name"] == name
        assert service.names() == sorted(NAMES)
        for name in NAMES:
            assert service.client.delete(f"/adapters/{encode(name)}").status_code == 204
        assert service.names() == []
        assert service.collect() == []


def test_names_outlive_a_restart_and_keep_their_files(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        digests = {}
        for seed, name in enumerate(NAMES):
            digests[name] = service.put(quote(name, safe=""), seed).json()["digest"]
        assert len(service.collect()) == 2 * len(NAMES)
    with serving(tmp_path) as service:
        assert {adapter["name"]: adapter["digest"] for adapter in service.adapters()} == digests
        assert service.client.delete("/adapters/org/name").status_code == 204
        assert service.names() == sorted(set(NAMES) - {"org/name"})


def test_a_name_with_a_space_is_refused_with_the_reason(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        for name, reason in (("my poet", "a space"), ("poet,bard", "','"), ("org/p%C3%B6et", "'ö'")):
            response = service.put(name)
            assert error(response) == (400, "invalid_name", "name")
            assert response.json()["error"]["message"].endswith(f"; it has {reason}")
        for name in ("org%2F%2Fname", "org%2F..%2Fname", "org%2F", "%2Forg", "team:"):
            assert error(service.put(name)) == (400, "invalid_name", "name")
        response = service.client.post("/adapters", json={"name": "my poet", "src": "hf://org/x"})
        assert error(response) == (400, "invalid_name", "name")


def served(live: LiveServer, model: str, **fields: str) -> str | None:
    """The digest that answers, None for the base."""
    response = live.post("/v1/completions", model=model, prompt="hello world", max_tokens=1, **fields)
    assert response.status_code == 200, response.text
    digest: str | None = response.headers.get("x-adapter-digest")
    return digest


def test_a_model_is_first_the_adapter_of_exactly_that_name(tiny_model: Path, tmp_path: Path) -> None:
    with live_server(fake_settings(tiny_model, tmp_path)) as live:

        def put(name: str, seed: int) -> str:
            response = live.client.put(f"/adapters/{name}", files=multipart(*bundle(seed)))
            digest: str = response.json()["digest"]
            return digest

        poet, seven, team = put("poet", 0), put("model@7", 1), put("team:poet", 2)
        assert [served(live, name) for name in ("poet", "model@7", "team:poet", "tiny")] == [poet, seven, team, None]
        assert served(live, "tiny:model@7") == seven
        assert served(live, f"model@7@{seven[:8]}") == served(live, f"tiny:model@7@{seven}") == seven
        assert served(live, "tiny", lora_path="team:poet") == team
        assert live.client.get("/v1/models/model@7").json()["id"] == "model@7"
        assert live.post("/v1/completions", model="model@8", prompt="x").status_code == 404
        # What was the base's form, or a digest's, is an adapter of its own as soon as there is one
        assert served(live, "tiny:poet") == served(live, f"poet@{poet[:8]}") == poet
        assert served(live, "tiny:poet") != put("tiny:poet", 3) == served(live, "tiny:poet")
        assert put(f"poet@{poet[:8]}", 4) == served(live, f"poet@{poet[:8]}") != poet
        assert 'adapter="team:poet"' in live.client.get("/metrics").text
        assert live.client.delete("/kv/namespaces/team:poet").status_code == 204
