"""Every route needs a scope, and no answer to somebody without a key tells anything."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from runtime.output.logs import fields_of
from service.app import OPEN_PATHS, routes
from service.keys.caller import ALL_SCOPES
from service.keys.scopes import OPEN_ROUTES, SCOPES
from tests.service.keys.keyed_server import Keyed, keyed_server, refusal
from tests.service.live_server import wait_until

CALLS = sorted((method, route.path) for route in routes for method in (route.methods or set()) - {"HEAD"})
NAME = "secret-team/poet"


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    keys = {f"only-{scope}": {"scopes": [scope]} for scope in sorted(ALL_SCOPES)}
    directory = tmp_path_factory.mktemp("a-directory-of-the-server")
    with keyed_server(tiny_model, directory, keys, api_key="the-option's key") as keyed:
        assert keyed["only-manage"].upload(NAME).status_code == 201
        yield keyed


def filled(path: str) -> str:
    return re.sub(r"{.*?}", NAME, path)


def test_every_route_has_its_scopes_and_nothing_else_has() -> None:
    assert set(SCOPES) == set(CALLS)
    assert set(OPEN_ROUTES) == {"/health", "/health/ready", "/ping", "/", "/ui", "/ui/{version}/{file}"}


@pytest.mark.parametrize("scope", sorted(ALL_SCOPES))
def test_a_key_calls_what_its_scope_allows_and_is_told_which_one_it_lacks(server: Keyed, scope: str) -> None:
    """A call that is let in fails for another reason: it has no body, and no resource."""
    client = server[f"only-{scope}"]
    for method, path in CALLS:
        needed = SCOPES[method, path]
        if (method, path) == ("POST", "/pause"):
            continue  # which would stop the engine
        answer = client.request(method, filled(path).replace(NAME, "nothing"))
        if not needed or scope in needed:
            assert answer.status_code not in (401, 403), (method, path, answer.text)
        else:
            assert refusal(answer) == (403, "missing_scope"), (method, path)
            message = answer.json()["error"]["message"]
            assert f"a key with the scope {' or '.join(sorted(needed))}, and this key has {scope}" in message


def test_the_options_key_may_do_everything(server: Keyed) -> None:
    headers = {"authorization": "Bearer the-option's key"}
    for path in ("/metrics", "/adapters", "/v1/models", "/kv"):
        assert httpx.get(f"{server.live.url}{path}", headers=headers).status_code == 200
    generated = {"model": NAME, "prompt": "hello", "max_tokens": 2}
    assert httpx.post(f"{server.live.url}/v1/completions", headers=headers, json=generated).status_code == 200


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer wrong", "Basic {key}", "{key}", "Bearer {key}x", "Bearer {other}"]
)
def test_without_a_valid_key_no_answer_has_a_name_a_path_a_digest_or_a_key(server: Keyed, header: str) -> None:
    key = server["only-admin"].key
    other = key.replace("only-admin", "only-manage")
    [adapter] = server["only-manage"].get("/adapters").json()["adapters"]
    told = [NAME, "poet", str(server.file.parent), "only-", "the-option", adapter["digest"][:8], key[-8:]]
    sent = header.format(key=key, other=other)
    with httpx.Client(base_url=server.live.url, headers={"authorization": sent} if sent else {}) as stranger:
        for method, path in [*CALLS, ("GET", "/nowhere"), ("TRACE", "/adapters"), ("OPTIONS", "/adapters")]:
            for asked in (filled(path), filled(path).replace(NAME, "nothing")):
                answer = stranger.request(method, asked)
                text = f"{answer.headers}{answer.text}"
                assert not [each for each in told if each in text], (method, asked, text)
                assert answer.status_code == (200 if asked in OPEN_PATHS else 401), (method, asked)


@pytest.mark.parametrize("key", ["schlüssel", "rk_only-admin_schlüssel", "κλειδί"])
def test_a_key_that_is_not_ascii_is_refused_by_name(server: Keyed, key: str) -> None:
    answer = httpx.get(f"{server.live.url}/v1/models", headers={"authorization": f"Bearer {key}".encode()})
    assert refusal(answer) == (401, "invalid_api_key")
    assert "characters that no key has" in answer.json()["error"]["message"]


def test_metrics_count_requests_by_the_ids_of_keys(server: Keyed) -> None:
    httpx.get(f"{server.live.url}/v1/models")
    server["only-generate"].complete()
    text = server["only-admin"].get("/metrics").text
    for sample in (
        r'rootstock_key_requests_total{key="_none",status="4xx"} \d',
        r'rootstock_key_requests_total{key="only-generate",status="2xx"} \d',
        r'rootstock_key_tokens_total{key="only-generate"} \d',
        r'rootstock_key_requests_in_flight{key="only-admin"} 1.0',
        r'rootstock_key_disk_bytes{key="only-manage"} [1-9]',
        r'rootstock_key_pinned_bytes{key="only-manage"} 0',
    ):
        assert re.search(f"^{sample}", text, re.M), sample


def test_the_access_log_names_a_keys_id_and_never_the_key(server: Keyed, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    client = server["only-generate"]
    client.complete()
    assert client.get("/adapters").status_code == 403
    for path, status in (("/v1/completions", 200), ("/adapters", 403)):
        line = {"path": path, "status": status, "key": "only-generate"}
        wait_until(lambda line=line: any(line.items() <= dict(fields_of(each)).items() for each in caplog.records))
    secret = client.key.split("_", 2)[2]
    assert not any(secret in f"{each.getMessage()} {fields_of(each)}" for each in caplog.records)


def test_strangers_write_few_lines(server: Keyed, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "service.access")
    with httpx.Client(base_url=server.live.url) as stranger:
        for _ in range(50):
            assert [stranger.get(path).status_code for path in ("/v1/models", "/health", "/nowhere")] == [401, 200, 401]
    lines = [each for each in list(caplog.records) if each.name.startswith("service.access")]
    assert len(lines) < 50
