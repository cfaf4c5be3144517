"""Requests to aLoRA adapters: where the adapter begins, and what becomes of a prompt without its invocation.

The fake engine's answer on an adapter is the prompt from the activation on, turned round; on the base, the prompt.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from safetensors.numpy import save

from tests.service.adapters.adapter_bundles import CONFIG, WEIGHTS, config, multipart, tensors
from tests.service.alora_service import INVOCATION, alora_server, encode, put_adapter
from tests.service.live_server import LiveServer, fake_settings, live_server


@pytest.fixture(scope="module")
def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with alora_server(tiny_model, tmp_path_factory.mktemp("data")) as running:
        yield running


def turned(live: LiveServer, text: str) -> str:
    decoded: str = live.services.tokenizer.decode(encode(live, text)[::-1])
    return decoded


def complete(live: LiveServer, prompt: object, model: str = "check", **body: object) -> httpx.Response:
    return live.post("/v1/completions", model=model, prompt=prompt, **body)


def chat(live: LiveServer, content: str = "hello", model: str = "check", **body: object) -> httpx.Response:
    messages = [{"role": "user", "content": content}]
    return live.post("/v1/chat/completions", model=model, messages=messages, **body)


def text_of(response: httpx.Response, choice: int = 0) -> str:
    """The text of one choice, however it came."""
    assert response.status_code == 200, response.text
    if not response.headers["content-type"].startswith("text/event-stream"):
        found = response.json()["choices"][choice]
        return found["text"] if "text" in found else found["message"]["content"]
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    pieces = [piece for line in lines[:-1] for piece in json.loads(line)["choices"] if piece["index"] == choice]
    return "".join(piece.get("text") or piece.get("delta", {}).get("content") or "" for piece in pieces)


def invoked(response: httpx.Response) -> tuple[str | None, str | None]:
    return response.headers.get("x-alora-invocation"), response.headers.get("x-alora-activation")


def error(response: httpx.Response) -> tuple[int, str, str | None]:
    found = response.json()["error"]
    return response.status_code, found["code"], found["param"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_tokens", [False, True])
def test_an_adapter_begins_at_the_last_invocation(live: LiveServer, stream: bool, as_tokens: bool) -> None:
    before, after = f"hello{INVOCATION} world", f"{INVOCATION}why"
    prompt = encode(live, before + after) if as_tokens else before + after
    length = len(encode(live, after))
    response = complete(live, prompt, max_tokens=2 * length, stream=stream)
    assert text_of(response) == turned(live, after) * 2
    assert invoked(response) == ("found", str(len(encode(live, before))))
    assert response.headers["x-adapter-digest"] == live.client.get("/adapters/check").json()["digest"]


@pytest.mark.parametrize(
    "asked", [{}, {"alora": None}, {"alora": {}}, {"alora": {"on_missing": None}}, {"alora": {"on_missing": "error"}}]
)
def test_without_its_invocation_a_request_is_refused_with_the_tokens_and_their_text(
    live: LiveServer, asked: dict
) -> None:
    for response, param in ((complete(live, "hello", **asked), "prompt"), (chat(live, **asked), "messages")):
        assert error(response) == (400, "alora_invocation_missing", param)
        message = response.json()["error"]["message"]
        assert str(encode(live, INVOCATION)) in message
        assert repr(INVOCATION) in message
    assert live.running() == 0


def test_part_of_an_invocation_is_none(live: LiveServer) -> None:
    partial = encode(live, INVOCATION)[:-1]
    assert error(complete(live, [5, *partial]))[1] == "alora_invocation_missing"


def test_text_that_only_looks_like_the_invocation_is_none(live: LiveServer) -> None:
    """Tokens are compared, not text: spelled out in other tokens it is another prompt."""
    spelled = [token for letter in INVOCATION for token in encode(live, letter)]
    assert live.services.tokenizer.shown(spelled) == INVOCATION
    assert error(complete(live, spelled))[1] == "alora_invocation_missing"


def test_a_long_invocation_does_not_fill_the_message(live: LiveServer) -> None:
    put_adapter(live, "wordy", list(range(3, 200)))
    message = complete(live, "hello", "wordy").json()["error"]["message"]
    assert len(message) < 1000
    assert "66, ...]" in message


@pytest.mark.parametrize("stream", [False, True])
def test_the_base_may_run_instead(live: LiveServer, stream: bool) -> None:
    digest = live.client.get("/adapters/check").json()["digest"]
    for response in (
        complete(live, "hello world", max_tokens=4, stream=stream, alora={"on_missing": "base"}),
        chat(live, max_tokens=7, stream=stream, alora={"on_missing": "base"}),
    ):
        assert text_of(response) in ("hello worldhello world", "user\nhello")
        assert invoked(response) == ("base", None)
        assert response.headers["x-adapter-digest"] == digest


def test_a_version_is_held_while_the_base_runs_instead(live: LiveServer) -> None:
    put_adapter(live, "brief", encode(live, INVOCATION), seed=7)
    body = {"model": "brief", "prompt": "hello", "cache_salt": "hold", "stream": True, "alora": {"on_missing": "base"}}
    with live.client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        assert "hello" in next(lines)
        assert live.client.get("/adapters/brief").json()["requests_in_flight"] == 1
        assert live.client.delete("/adapters/brief").status_code == 204
        assert live.client.get("/adapters/brief").json()["state"] == "draining"


@pytest.mark.parametrize("stream", [False, True])
def test_the_invocation_may_be_appended_and_counts_as_prompt(live: LiveServer, stream: bool) -> None:
    length = len(encode(live, INVOCATION))
    response = complete(
        live,
        "hello world",
        max_tokens=2 * length,
        stream=stream,
        stream_options={"include_usage": True},
        alora={"on_missing": "append"},
    )
    assert text_of(response) == turned(live, INVOCATION) * 2
    assert invoked(response) == ("appended", "2")
    usage = json.loads(response.text.splitlines()[-4].removeprefix("data: ")) if stream else response.json()
    assert usage["usage"]["prompt_tokens"] == 2 + length


@pytest.mark.parametrize("stream", [False, True])
def test_in_a_chat_it_is_appended_in_place_of_the_assistants_header(live: LiveServer, stream: bool) -> None:
    before, length = encode(live, "<|start|>user\nhello<|end|>\n"), len(encode(live, INVOCATION))
    response = chat(live, max_tokens=2 * length, stream=stream, alora={"on_missing": "append"})
    assert text_of(response) == turned(live, INVOCATION) * 2
    assert invoked(response) == ("appended", str(len(before)))
    if not stream:
        assert response.json()["usage"]["prompt_tokens"] == len(before) + length


def test_the_assistants_header_may_be_the_invocation(live: LiveServer) -> None:
    before = encode(live, "<|start|>user\nhello<|end|>\n")
    for asked in ({}, {"alora": {"on_missing": "append"}}):
        assert invoked(chat(live, model="header", max_tokens=1, **asked)) == ("found", str(len(before)))


def test_a_prompt_that_has_the_invocation_is_not_given_another(live: LiveServer) -> None:
    for way in ("error", "base", "append"):
        response = complete(live, f"hello{INVOCATION}", max_tokens=1, alora={"on_missing": way})
        assert invoked(response) == ("found", "1")


def test_each_prompt_of_a_list_has_its_own_activation(live: LiveServer) -> None:
    prompts = ["hello", f"hello world{INVOCATION}", f"{INVOCATION}why"]
    appended = complete(live, prompts, max_tokens=1, alora={"on_missing": "append"})
    assert invoked(appended) == ("appended, found, found", "1, 2, 0")
    assert [text_of(appended, choice) for choice in range(3)] == ["\n", "\n", "y"]
    based = complete(live, prompts, max_tokens=1, alora={"on_missing": "base"})
    assert invoked(based) == ("base, found, found", "-, 2, 0")
    assert [text_of(based, choice) for choice in range(3)] == ["hello", "\n", "y"]
    assert error(complete(live, prompts))[1] == "alora_invocation_missing"


def test_the_headers_of_a_long_list_are_bounded(live: LiveServer) -> None:
    response = complete(live, ["hello"] * 200, max_tokens=1, alora={"on_missing": "append"})
    assert invoked(response) == (", ".join(["appended"] * 64), ", ".join(["1"] * 64))


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_has_the_activation_of_its_prompt(live: LiveServer, stream: bool) -> None:
    length = len(encode(live, INVOCATION))
    response = complete(
        live, "a prompt of its own", n=3, max_tokens=2 * length, stream=stream, alora={"on_missing": "append"}
    )
    assert [text_of(response, choice) for choice in range(3)] == [turned(live, INVOCATION) * 2] * 3


def test_appended_tokens_count_against_the_context(live: LiveServer) -> None:
    room = 200 - len(encode(live, INVOCATION))
    fits = complete(live, [5] * (room - 1), alora={"on_missing": "append"})
    assert fits.json()["usage"]["completion_tokens"] == 1
    response = complete(live, [5] * room, alora={"on_missing": "append"})
    assert error(response) == (400, "context_length_exceeded", "prompt")
    assert "200" in response.json()["error"]["message"]
    assert error(complete(live, [5] * 60_000)) == (400, "context_length_exceeded", "prompt")


@pytest.mark.parametrize("model", ["tiny", "plain"])
def test_other_models_have_nothing_to_do_with_it(live: LiveServer, model: str) -> None:
    assert error(complete(live, "hello", model, alora={})) == (400, "alora_not_applicable", "alora")
    assert error(chat(live, model=model, alora={"on_missing": "base"})) == (400, "alora_not_applicable", "alora")
    response = complete(live, f"hello{INVOCATION}", model, alora=None, max_tokens=1)
    assert invoked(response) == (None, None)


@pytest.mark.parametrize(
    ("alora", "code", "param"),
    [
        ({"on_missing": "guess"}, "invalid_field", "alora.on_missing"),
        ({"on_missing": "base", "more": 1}, "unknown_field", "alora.more"),
        ("append", "invalid_field", "alora"),
    ],
)
def test_a_wrong_wish_is_refused_by_name(live: LiveServer, alora: object, code: str, param: str) -> None:
    assert error(complete(live, "hello", alora=alora)) == (400, code, param)
    assert error(chat(live, alora=alora)) == (400, code, param)


def test_a_wrong_wish_is_told_what_there_is_to_wish_for(live: LiveServer) -> None:
    message = complete(live, "hello", alora={"on_missing": "Append"}).json()["error"]["message"]
    assert message == "alora.on_missing: Invalid enum value 'Append', expected one of append, base, error"


def test_an_alora_is_asked_for_in_sagemakers_words_too(live: LiveServer) -> None:
    body = {"prompt": "hello", "max_tokens": 1, "alora": {"on_missing": "append"}}
    headers = {"X-Amzn-SageMaker-Adapter-Identifier": "check"}
    assert invoked(live.client.post("/invocations", json=body, headers=headers)) == ("appended", "1")


def test_the_resource_shows_the_invocation(live: LiveServer) -> None:
    shown = live.client.get("/adapters/check").json()
    assert (shown["kind"], shown["invocation_tokens"]) == ("alora", encode(live, INVOCATION))
    shown = live.client.get("/adapters/plain").json()
    assert (shown["kind"], shown["invocation_tokens"]) == ("lora", None)


def test_an_alora_comes_from_a_source_and_survives_a_restart(tiny_model: Path, tmp_path: Path) -> None:
    with alora_server(tiny_model, tmp_path, allowed_sources=(f"file://{tmp_path}",)) as live:
        (tmp_path / "bundle").mkdir()
        (tmp_path / "bundle" / CONFIG).write_bytes(config(alora_invocation_tokens=[7, 8]))
        (tmp_path / "bundle" / WEIGHTS).write_bytes(save(tensors(9)))
        response = live.post("/adapters", name="sourced", src=f"file://{tmp_path}/bundle")
        assert response.status_code == 201, response.text
        assert response.json()["invocation_tokens"] == [7, 8]
    with alora_server(tiny_model, tmp_path) as live:
        assert live.client.get("/adapters/sourced").json()["invocation_tokens"] == [7, 8]
        assert invoked(complete(live, [5, 7, 8], "sourced")) == ("found", "1")


@pytest.mark.parametrize(("model", "cached"), [("tiny", "48"), ("late", "48"), ("plain", "0"), ("check", "48")])
def test_what_was_computed_on_the_base_is_reused_where_the_kv_are_the_bases(
    live: LiveServer, model: str, cached: str
) -> None:
    text = f"{model:8}: more than 48 characters of a prompt for everyone"
    complete(live, text, "tiny", max_tokens=1)
    assert complete(live, text + INVOCATION, model, max_tokens=1).headers["x-cached-tokens"] == cached


@pytest.mark.parametrize("appended", [False, True])
def test_an_alora_that_leaves_k_and_v_alone_shares_them_from_its_invocation_on_too(
    live: LiveServer, appended: bool
) -> None:
    put_adapter(live, "late-check", encode(live, INVOCATION), last_layer=True)
    before, alora = f"{appended!s:<14}", {"on_missing": "append"} if appended else None
    assert len(encode(live, before)) < 16 < len(encode(live, before + INVOCATION))
    first = complete(live, before + INVOCATION * (not appended), "late-check", max_tokens=1, alora=alora)
    assert invoked(first) == ("appended" if appended else "found", "14")
    assert complete(live, before + INVOCATION, "tiny", max_tokens=1).headers["x-cached-tokens"] == "16"


def test_a_long_chat_is_searched_and_one_that_is_too_long_is_not(tiny_model: Path, tmp_path: Path) -> None:
    with alora_server(tiny_model, tmp_path, max_model_len=70_000) as live:
        assert error(chat(live, "x" * 60_000)) == (400, "alora_invocation_missing", "messages")
        found = chat(live, "x" * 60_000 + INVOCATION, max_tokens=20_000)
        assert error(found) == (400, "context_length_exceeded", "max_tokens")
        assert error(chat(live, "x" * 600_000)) == (400, "context_length_exceeded", "messages")


def test_a_server_may_answer_as_peft_does_where_the_invocation_is_missing(tiny_model: Path, tmp_path: Path) -> None:
    with alora_server(tiny_model, tmp_path, alora_on_missing="base") as live:
        for asked in ({}, {"alora": {}}):
            for response in (complete(live, "hello world", max_tokens=4, **asked), chat(live, max_tokens=4, **asked)):
                assert invoked(response) == ("base", None)
        assert text_of(complete(live, "hello world", max_tokens=4)) == "hello worldhello world"
        assert invoked(complete(live, f"hello{INVOCATION}", max_tokens=1))[0] == "found"
        assert error(complete(live, "hello", alora={"on_missing": "error"}))[1] == "alora_invocation_missing"
        messages = [{"role": "user", "content": "hello"}]
        assert live.post("/kv/prefixes", model="check", messages=messages).status_code == 201


def test_an_adapter_has_a_default_of_its_own_that_outlives_a_restart_and_a_new_version(
    tiny_model: Path, tmp_path: Path
) -> None:
    def put(live: LiveServer, seed: int, query: str = "") -> httpx.Response:
        files = multipart(config(alora_invocation_tokens=encode(live, INVOCATION)), save(tensors(seed)))
        return live.client.put(f"/adapters/mine{query}", files=files)

    with alora_server(tiny_model, tmp_path, alora_on_missing="base") as live:
        assert put(live, 0, "?alora_on_missing=append").json()["alora_on_missing"] == "append"
        assert invoked(complete(live, "hello", "mine", max_tokens=1))[0] == "appended"
        assert invoked(complete(live, "hello", "mine", max_tokens=1, alora={"on_missing": "base"}))[0] == "base"
        assert put(live, 1).json()["alora_on_missing"] == "append"
    with alora_server(tiny_model, tmp_path) as live:
        assert live.client.get("/adapters/mine").json()["alora_on_missing"] == "append"
        assert invoked(complete(live, "hello", "mine", max_tokens=1))[0] == "appended"
        assert put(live, 1, "?alora_on_missing=error").json()["alora_on_missing"] == "error"
        assert error(complete(live, "hello", "mine"))[1] == "alora_invocation_missing"
        assert live.client.get("/adapters/check").json()["alora_on_missing"] is None


def test_a_default_for_a_plain_lora_or_another_word_is_refused(live: LiveServer) -> None:
    answer = live.client.put("/adapters/plain?alora_on_missing=base", files=multipart(config(), save(tensors(0))))
    assert error(answer) == (400, "alora_not_applicable", "alora_on_missing")
    answer = live.client.put("/adapters/plain?alora_on_missing=peft", files=multipart(config(), save(tensors(0))))
    assert error(answer) == (400, "invalid_query", "alora_on_missing")


def test_an_import_sets_the_default_too(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / CONFIG).write_bytes(config(alora_invocation_tokens=[7, 8]))
    (tmp_path / "bundle" / WEIGHTS).write_bytes(save(tensors()))
    settings = fake_settings(tiny_model, tmp_path / "data", allowed_sources=(f"file://{tmp_path}",))
    with live_server(settings) as live:
        source = {"name": "sourced", "src": f"file://{tmp_path}/bundle", "alora_on_missing": "base"}
        assert live.post("/adapters", **source).json()["alora_on_missing"] == "base"
        assert invoked(complete(live, "hello", "sourced", max_tokens=1)) == ("base", None)
