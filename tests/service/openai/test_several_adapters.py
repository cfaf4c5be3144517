"""Requests with an adapter for each prompt, and requests on a weighted mix of adapters.

The fake engine's answer on an adapter is the prompt from its invocation on, turned round; on the base, the prompt.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.numpy import save

from tests.service.adapters.adapter_bundles import config, multipart, tensors
from tests.service.alora_service import INVOCATION, alora_server, encode, put_adapter
from tests.service.live_server import LiveServer, fake_settings, live_server, wait_until

HELLO = "hello world"  # two tokens
FORWARD, TURNED = "hello world", " worldhello"
LONG = "a prompt of forty and some more characters"  # two full blocks


@pytest.fixture(scope="module")
def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """`check` and `header` are aLoRAs, `plain`, `late` and `other` are plain LoRAs."""
    with alora_server(tiny_model, tmp_path_factory.mktemp("data"), max_lora_rank=4) as running:
        put_adapter(running, "other", seed=7)
        put_adapter(running, "again", encode(running, INVOCATION), seed=8)
        yield running


def digest(live: LiveServer, name: str) -> str:
    found: str = live.client.get(f"/adapters/{name}").json()["digest"]
    return found


def complete(live: LiveServer, prompt: Any = HELLO, **body: Any) -> httpx.Response:
    return live.complete(prompt, max_tokens=2, **body)


def texts(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


def error(response: httpx.Response) -> tuple[int, str, str | None]:
    found = response.json()["error"]
    return response.status_code, found["code"], found["param"]


def message(response: httpx.Response) -> str:
    found: str = response.json()["error"]["message"]
    return found


def mixes(live: LiveServer) -> list[Path]:
    """The files of all mixes that are kept."""
    return sorted(live.services.catalog.blobs._files.scratch.glob("*.safetensors"))


# One adapter for each prompt


@pytest.mark.parametrize("field", ["lora_path", "adapter_id"])
def test_each_prompt_of_a_list_runs_on_its_own_adapter(live: LiveServer, field: str) -> None:
    response = complete(live, [HELLO, HELLO, HELLO], **{field: ["plain", None, "late"]})
    assert texts(response) == [TURNED, FORWARD, TURNED]
    assert response.headers["x-adapter-digests"] == f"{digest(live, 'plain')[:16]}, -, {digest(live, 'late')[:16]}"
    assert "x-adapter-digest" not in response.headers
    assert "x-alora-invocation" not in response.headers
    assert response.json()["model"] == "tiny"


def test_a_list_of_one_adapter_has_its_digest_and_a_list_of_the_base_has_none(live: LiveServer) -> None:
    response = complete(live, [HELLO, HELLO], lora_path=["plain", "tiny:plain"])
    assert response.headers["x-adapter-digest"] == digest(live, "plain")
    assert "x-adapter-digests" not in response.headers
    response = complete(live, [HELLO, HELLO], lora_path=[None, "tiny"])
    assert texts(response) == [FORWARD, FORWARD]
    assert not {"x-adapter-digest", "x-adapter-digests"} & response.headers.keys()


def test_a_prompt_of_token_ids_is_one_prompt_and_choices_share_its_adapter(live: LiveServer) -> None:
    ids = encode(live, HELLO)
    assert texts(complete(live, ids, lora_path=["plain"])) == [TURNED]
    assert texts(complete(live, [ids, ids], lora_path=["plain", None], n=2)) == [TURNED, TURNED, FORWARD, FORWARD]


@pytest.mark.parametrize(("prompt", "names", "count"), [(HELLO, 2, 1), ([HELLO] * 3, 1, 3), ([HELLO] * 2, 0, 2)])
def test_another_number_of_adapters_than_prompts_is_refused_with_both(
    live: LiveServer, prompt: Any, names: int, count: int
) -> None:
    response = complete(live, prompt, lora_path=["check"] * names)
    assert error(response) == (400, "invalid_field", "lora_path")
    assert f"names {names} adapters and there are {count} prompts" in message(response)


def test_an_alora_of_a_list_begins_in_its_own_prompts(live: LiveServer) -> None:
    prompts = [f"hello{INVOCATION}", HELLO, HELLO, HELLO]
    names = ["check", None, "plain", "header"]
    refused = complete(live, prompts, lora_path=names)
    assert error(refused) == (400, "alora_invocation_missing", "prompt")
    assert "'header'" in message(refused)
    response = complete(live, prompts, lora_path=names, alora={"on_missing": "base"})
    assert texts(response)[1:] == [FORWARD, TURNED, FORWARD]
    assert response.headers["x-alora-invocation"] == "found, -, -, base"
    assert response.headers["x-alora-activation"] == "1, -, -, -"


def test_a_model_that_is_an_adapter_must_be_the_adapter_of_every_prompt(live: LiveServer) -> None:
    body: dict[str, Any] = {"model": "plain", "prompt": [HELLO, HELLO], "max_tokens": 2}
    assert texts(live.post("/v1/completions", **body, lora_path=["plain", "plain"])) == [TURNED, TURNED]
    for names, param in ((["plain", "late"], "lora_path[1]"), ([None, "plain"], "lora_path[0]")):
        assert error(live.post("/v1/completions", **body, lora_path=names)) == (400, "conflicting_adapters", param)
    missing = live.post("/v1/completions", **(body | {"model": "tiny"}), lora_path=["plain", "nobody"])
    assert error(missing) == (404, "model_not_found", "lora_path[1]")


def test_two_lists_must_be_equal(live: LiveServer) -> None:
    names = ["plain", None]
    assert texts(complete(live, [HELLO] * 2, lora_path=names, adapter_id=names)) == [TURNED, FORWARD]
    for other in (["plain", "plain"], "plain"):
        response = complete(live, [HELLO] * 2, lora_path=names, adapter_id=other)
        assert error(response) == (400, "conflicting_adapters", "adapter_id")


def test_a_chat_takes_no_list(live: LiveServer) -> None:
    assert error(live.chat("hello", lora_path=["plain"])) == (400, "invalid_field", "lora_path")


def test_every_adapter_of_a_list_stays_in_use_to_the_end(live: LiveServer) -> None:
    """A name that gets other bytes meanwhile changes nothing for the request."""
    put_adapter(live, "first", seed=20)
    put_adapter(live, "second", seed=21)
    before = [digest(live, name) for name in ("first", "second")]
    body = {"model": "tiny", "prompt": [HELLO, HELLO], "lora_path": ["first", "second"], "max_tokens": 2}
    held = {"cache_salt": "hold", "stream": True}
    with live.client.stream("POST", "/v1/completions", json=body | held) as stream:
        assert stream.headers["x-adapter-digests"] == ", ".join(each[:16] for each in before)
        versions = live.services.catalog.versions
        assert [versions.named(name).requests for name in ("first", "second")] == [1, 1]
        put_adapter(live, "second", seed=22)
        assert live.services.catalog.blobs.referenced(before[1])
    wait_until(lambda: not live.services.catalog.blobs.referenced(before[1]))
    for name in ("first", "second"):
        assert live.client.delete(f"/adapters/{name}").status_code == 204


# Mixes


def test_a_mix_runs_as_an_adapter_with_a_digest_of_its_own(live: LiveServer) -> None:
    response = complete(live, adapters={"plain": 0.7, "other": -0.3})
    assert texts(response) == [TURNED]
    found = response.headers["x-adapter-digest"]
    assert found not in {digest(live, "plain"), digest(live, "other")}
    chat = live.chat("hello", adapters={"other": -0.3, "plain": 0.7}, max_tokens=2)
    assert chat.headers["x-adapter-digest"] == found
    assert [path.stem for path in mixes(live)].count(found) == 1
    assert found in {share["namespace"] for share in live.client.get("/kv").json()["namespaces"]}


def test_a_weight_of_zero_is_dropped_and_one_adapter_of_weight_one_is_itself(live: LiveServer) -> None:
    before = mixes(live)
    for weights in ({"plain": 1.0}, {"plain": 1, "other": 0}, {"other": -0.0, "plain": 1.0}):
        assert complete(live, adapters=weights).headers["x-adapter-digest"] == digest(live, "plain")
    for weights in ({}, {"plain": 0.0}, {"plain": 0, "check": 0}):
        response = complete(live, adapters=weights)
        assert texts(response) == [FORWARD]
        assert "x-adapter-digest" not in response.headers
    assert mixes(live) == before
    assert complete(live, adapters={"plain": -1.0}).headers["x-adapter-digest"] != digest(live, "plain")


def test_the_same_mix_reuses_its_k_v_and_other_weights_do_not(live: LiveServer) -> None:
    def cached(**weights: float) -> int:
        return int(complete(live, LONG, adapters=weights).headers["x-cached-tokens"])

    assert cached(plain=0.5, other=0.5) == 0
    assert cached(other=0.5, plain=0.5) > 0
    assert cached(plain=0.5, other=0.25) == 0
    assert cached(plain=0.5, other=0.5) > 0


def test_an_adapter_that_is_uploaded_anew_gives_a_new_mix(live: LiveServer) -> None:
    def ask() -> httpx.Response:
        return complete(live, LONG, adapters={"changing": 0.5, "plain": 0.5})

    put_adapter(live, "changing", seed=30)
    first = ask()
    old = first.headers["x-adapter-digest"]
    put_adapter(live, "changing", seed=31)
    second = ask()
    assert second.headers["x-adapter-digest"] != old
    assert second.headers["x-cached-tokens"] == "0"
    wait_until(lambda: old not in [path.stem for path in mixes(live)])  # nobody can ask for it any more
    put_adapter(live, "changing", seed=30)
    assert ask().headers["x-adapter-digest"] == old
    live.client.delete("/adapters/changing")
    wait_until(lambda: old not in [path.stem for path in mixes(live)])
    assert error(ask()) == (404, "model_not_found", "adapters.changing")


@pytest.mark.parametrize(
    ("weights", "expected", "words"),
    [
        ({"plain": 0.5, "nobody": 0.5}, (404, "model_not_found", "adapters.nobody"), "'nobody'"),
        ({"plain": 0.5, "nobody": 0}, (404, "model_not_found", "adapters.nobody"), "'nobody'"),
        ({"plain": 0.5, "tiny": 0.5}, (400, "invalid_field", "adapters.tiny"), "is the base model"),
        ({"plain": 0.5, "check": 0.5}, (400, "invalid_mix", "adapters.check"), "is an aLoRA with the invocation ["),
        ({"plain": 0.5, "tiny:check": 1}, (400, "invalid_mix", "adapters.tiny:check"), "'tiny:check' is an aLoRA"),
        ({"check": 0.5, "header": 0.5}, (400, "invalid_mix", "adapters.header"), "aLoRAs of one invocation"),
        ({"plain": 1e300}, (400, "invalid_mix", "adapters"), "overflows float32"),
        ({"plain": "much"}, (400, "invalid_field", "adapters[...]"), "Expected float, got str"),
        ({f"a{index}": 1.0 for index in range(9)}, (400, "invalid_field", "adapters"), "8"),
        # Two ranks each, and the service allows four
        (
            {"plain": 0.5, "other": 0.5, "tiny:plain": 0.5},
            (400, "invalid_mix", "adapters"),
            "rank 6 in the mix, and max_lora_rank is 4; mix fewer, or start the server with --max-lora-rank 6",
        ),
    ],
)
def test_a_mix_that_is_none_is_refused_by_name(
    live: LiveServer, weights: dict[str, Any], expected: tuple[int, str, str], words: str
) -> None:
    for response in (complete(live, adapters=weights), live.chat("hello", adapters=weights)):
        assert error(response) == expected
        assert words in message(response)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_weight_that_is_no_finite_number_is_refused(live: LiveServer, number: str) -> None:
    body = f'{{"model": "tiny", "prompt": "hello", "adapters": {{"plain": {number}}}}}'
    response = live.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] in ("invalid_json", "invalid_field")


def test_a_mix_beside_another_name_of_an_adapter_is_refused(live: LiveServer) -> None:
    for field in ({"model": "plain"}, {"lora_path": "plain"}, {"adapter_id": "tiny"}, {"lora_path": [None]}):
        body = {"model": "tiny", "prompt": HELLO, "adapters": {"other": 0.5}, **field}
        assert error(live.post("/v1/completions", **body)) == (400, "conflicting_adapters", "adapters")


def test_a_mix_of_aloras_of_one_invocation_begins_there(live: LiveServer) -> None:
    length = len(encode(live, "hello"))
    response = complete(live, f"hello{INVOCATION}", adapters={"check": 0.5, "again": 2})
    assert texts(response)
    assert response.headers["x-alora-activation"] == str(length)
    refused = complete(live, adapters={"check": 0.5, "again": 2})
    assert error(refused) == (400, "alora_invocation_missing", "prompt")
    assert "0.5 check" in message(refused)
    assert "2 again" in message(refused)


def test_requests_of_several_adapters_count_in_series_of_their_own(live: LiveServer) -> None:
    def count(label: str) -> float:
        line = f'rootstock_requests_total{{adapter="{label}",outcome="finished"}} '
        found = [each for each in live.client.get("/metrics").text.splitlines() if each.startswith(line)]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    labels = ("_mix", "_several", "plain")
    before = [count(label) for label in labels]
    complete(live, adapters={"plain": 0.5, "other": 0.5})
    complete(live, [HELLO] * 2, lora_path=["plain", None])
    complete(live, [HELLO] * 2, lora_path=["plain", "plain"])
    assert [count(label) for label in labels] == [each + 1 for each in before]


def test_a_mix_whose_file_is_gone_is_composed_again(live: LiveServer) -> None:
    weights = {"plain": 0.125, "other": 0.5}
    found = complete(live, adapters=weights).headers["x-adapter-digest"]
    path = next(path for path in mixes(live) if path.stem == found)
    content = path.read_bytes()
    path.unlink()
    assert complete(live, adapters=weights).headers["x-adapter-digest"] == found
    assert path.read_bytes() == content


def test_a_mix_outlives_the_engine(tiny_model: Path, tmp_path: Path) -> None:
    with live_server(fake_settings(tiny_model, tmp_path)) as live:
        for seed, name in enumerate("ab"):
            put_adapter(live, name, seed=seed)
        ask = {"adapters": {"a": 0.5, "b": 0.5}}
        found = complete(live, **ask).headers["x-adapter-digest"]
        assert complete(live, cache_salt="die", **ask).status_code == 503
        wait_until(lambda: live.client.get("/health/ready").status_code == 200)
        assert complete(live, **ask).headers["x-adapter-digest"] == found


def test_a_forced_deletion_ends_the_requests_on_mixes_of_the_adapter(live: LiveServer) -> None:
    put_adapter(live, "brief", seed=40)
    body = {"adapters": {"brief": 0.5, "plain": 0.5}, "cache_salt": "hold", "stream": True, "max_tokens": 2}
    with live.client.stream("POST", "/v1/completions", json={"model": "tiny", "prompt": HELLO, **body}) as stream:
        lines = stream.iter_lines()
        assert "text_completion" in next(lines)
        assert httpx.delete(f"{live.url}/adapters/brief", params={"force": True}).status_code == 204
        assert any("adapter_deleted" in line for line in lines)


def test_a_big_mix_of_the_ranks_that_are_allowed_fits(live: LiveServer) -> None:
    """Ranks count where they meet: adapters of different modules do not add up."""
    weights = {key.replace("q_proj", "o_proj"): value for key, value in tensors(50, rank=4).items()}
    files = multipart(config(rank=4, target_modules=["o_proj"]), save(weights))
    assert live.client.put("/adapters/elsewhere", files=files).status_code == 201
    response = complete(live, adapters={"plain": 0.5, "other": 0.5, "elsewhere": 3})
    assert texts(response) == [TURNED]
