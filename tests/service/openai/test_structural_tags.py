"""Structural tags over HTTP: free text in which a tag, once begun, has a form; the model's argmax judges."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runtime.grammar.grammars import Grammars as CompiledGrammars
from tests.service.grammars.test_structural_tag_grammars import (
    CALL,
    CALLS,
    END,
    LLAC,
    MARKERS,
    TAGS,
    TOKENIZER,
    TRIGGERED,
    of_format,
)
from tests.service.live_server import NAME, LiveServer, fake_settings, live_server
from tests.service.openai.test_structured import ENGINE
from tests.service.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    model = write_tiny_model(tmp_path_factory.mktemp("model"))
    TOKENIZER.save(str(model / "tokenizer.json"))
    config = json.loads((model / "config.json").read_text())
    changed = {"vocab_size": TOKENIZER.get_vocab_size(), "max_position_embeddings": 1024}
    (model / "config.json").write_text(json.dumps({**config, **changed}))
    options = {"load_format": "dummy", "kv_cache_bytes": 4 << 20, "adapter_bytes": 1 << 20}
    data = tmp_path_factory.mktemp("data")
    with live_server(fake_settings(model, data, engine_command=ENGINE, host_adapter_bytes=1 << 20, **options)) as live:
        yield live


ASKED = {"type": "structural_tag", "format": CALLS}
OLDER = {
    "type": "structural_tag",
    "structures": [{"begin": "<call>a ", "schema": {"enum": [1, "hello"]}, "end": "</call>"}],
    "triggers": ["<call>"],
}
BIAS = {str(CALL): 5.0, str(LLAC): 3.0, str(END): 1.0}


@pytest.mark.parametrize("form", [CALLS, {**TRIGGERED, "tags": TAGS}], ids=["tokens", "text"])
def test_every_token_is_the_likeliest_of_those_that_are_allowed(
    server: LiveServer, tmp_path: Path, form: dict[str, Any]
) -> None:
    """The judge asks for one token after each beginning, among those that the grammar allows there."""
    asked = {"temperature": 0, "logit_bias": BIAS | {str(TOKENIZER.token_to_id(each)): 3.0 for each in "<f"}}
    tags = {"response_format": {"type": "structural_tag", "format": form}, "return_token_ids": True}
    whole = server.complete("hello", max_tokens=24, **asked, **tags).json()["choices"][0]
    prompt, generated = whole["prompt_token_ids"], whole["token_ids"]
    assert CALL in generated or "<f=" in whole["text"]
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    grammars = CompiledGrammars(tmp_path, TOKENIZER.get_vocab_size(), [END])
    constraint = grammars.constrain(of_format(form, MARKERS))
    while not constraint.ready:
        grammars.wait(10)
    for place, token_id in enumerate(generated):
        allowed = [int(each) for each in constraint.allowed(generated[:place]).nonzero()[0]]
        assert constraint.failure is None
        one = server.complete(
            [prompt + generated[:place]], max_tokens=1, allowed_token_ids=allowed, return_token_ids=True, **asked
        )
        assert one.json()["choices"][0]["token_ids"] == [token_id]
    grammars.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": OLDER},
        {"structured_outputs": {"structural_tag": json.dumps(OLDER)}},
        {"structured_outputs": {"structural_tag": OLDER}},
        {"structural_tag": json.dumps(OLDER)},
        {"response_format": {**ASKED, "format": {**CALLS, "tags": [CALLS["tags"][0]]}}},
    ],
    ids=["vllm", "vllm, as text", "vllm, as an object", "sglang", "xgrammar"],
)
def test_every_dialect_holds_the_tags_of_chats_and_completions(server: LiveServer, fields: dict[str, Any]) -> None:
    for ask in (partial(server.chat, "hello"), partial(server.complete, "hello")):
        response = ask(max_tokens=60, seed=2, temperature=0.8, logit_bias=BIAS, **fields)
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        calls = text.split("<call>")[1:]
        assert len(calls) > 1
        for call in calls[: None if choice["finish_reason"] == "stop" else -1]:
            assert re.match(r'a (1|"hello")</call>', call)


def test_a_stream_with_tags_has_the_text_of_the_whole_answer(server: LiveServer) -> None:
    asked = {"response_format": ASKED, "max_tokens": 40, "temperature": 0, "logit_bias": BIAS}
    whole = server.chat("hello", **asked).json()["choices"][0]["message"]["content"]
    lines = server.chat("hello", stream=True, **asked).text.split("\n\n")
    parts = [json.loads(line.removeprefix("data: ")) for line in lines if line not in ("", "data: [DONE]")]
    assert "".join(part["choices"][0]["delta"].get("content") or "" for part in parts) == whole


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"response_format": {"type": "structural_tag"}}, "invalid_grammar", "response_format"),
        (
            {"response_format": {"type": "structural_tag", "format": {"type": "qwen_xml_parameter"}}},
            "invalid_field",
            "response_format.format.type",
        ),
        (
            {"response_format": {"type": "structural_tag", "format": {"type": "any_text", "excludes": ["a"]}}},
            "unknown_field",
            "response_format.format.excludes",
        ),
        (
            {"response_format": {"type": "structural_tag", "structures": [{"begin": "", "end": ""}], "triggers": []}},
            "invalid_field",
            "response_format.structures[0].begin",
        ),
        ({"structural_tag": OLDER, "regex": "a"}, "invalid_field", "structural_tag"),
        ({"structural_tag": "{"}, "invalid_grammar", "structural_tag"),
        ({"structural_tag": '{"type": "structural_tag", "other": 1}'}, "invalid_grammar", "structural_tag"),
    ],
)
def test_a_tag_that_is_not_built_is_refused_by_name(
    server: LiveServer, fields: dict[str, Any], code: str, param: str
) -> None:
    response = server.chat("hello", **fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param), error
    assert server.post("/v1/completions", model=NAME, prompt="hello", **fields).status_code == 400
