"""Reasoning models that are held to a form: it holds after the thoughts, on the real engine."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from service.grammars.grammars import ThoughtTokens, after_thoughts
from service.grammars.source import Source
from service.grammars.translation import translated
from tests.service.live_server import LiveServer, fake_settings, live_server
from tests.service.openai.test_structured import ENDS, ENGINE, PERSON, STOP
from tests.service.text.reasoning_templates import DEEPSEEK, QWEN
from tests.service.tiny_model import SPECIAL, make_tokenizer, write_tiny_model

TAGS = ("<think>", "</think>")


def thinking_tokenizer() -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer


BEGIN, END = map(thinking_tokenizer().token_to_id, TAGS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    model = write_tiny_model(tmp_path_factory.mktemp("model"))
    thinking_tokenizer().save(str(model / "tokenizer.json"))
    config = json.loads((model / "config.json").read_text())
    changed = {"vocab_size": thinking_tokenizer().get_vocab_size(), "max_position_embeddings": 4096}
    (model / "config.json").write_text(json.dumps({**config, **changed}))
    options = {"load_format": "dummy", "kv_cache_bytes": 4 << 20, "adapter_bytes": 1 << 20}
    settings = fake_settings(
        model,
        tmp_path_factory.mktemp("data"),
        engine_command=ENGINE,
        host_adapter_bytes=1 << 20,
        chat_template=QWEN,
        allow_request_chat_template=True,
        **options,
    )
    with live_server(settings) as live:
        yield live


def told(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    message: dict[str, Any] = response.json()["choices"][0]["message"]
    return message


SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": PERSON}}}
TAGGED = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": PERSON, "end": "</f>"}],
    "triggers": ["<f"],
    "at_least_one": False,
}
# Random weights think for ever: what ends the thoughts is made likely
THINKS = ENDS | {str(END): 4.0}


@pytest.mark.parametrize("seed", range(4))
def test_a_form_begins_after_thoughts_that_the_prompt_has_begun(server: LiveServer, seed: int) -> None:
    fields = {"max_tokens": 600, "seed": seed, "logit_bias": THINKS, "chat_template": DEEPSEEK}
    message = told(server.chat("hello", **fields, **SCHEMA))
    jsonschema.validate(json.loads(message["content"]), PERSON)
    if seed == 0:
        assert message["reasoning_content"]
    assert told(server.chat("hello", **fields, regex="[ab]{3}"))["content"] in {
        a + b + c for a in "ab" for b in "ab" for c in "ab"
    }


def test_a_model_may_think_first_or_not(server: LiveServer) -> None:
    for bias, thinks in ((ENDS | {str(BEGIN): 100.0, str(END): 100.0}, True), (ENDS | {str(BEGIN): -100.0}, False)):
        response = server.chat("hello", max_tokens=900, seed=1, n=6, logit_bias=bias, **SCHEMA)
        messages = [choice["message"] for choice in response.json()["choices"]]
        for message in messages:
            jsonschema.validate(json.loads(message["content"]), PERSON)
        assert any("reasoning_content" in message for message in messages) is thinks


def test_where_the_prompt_has_ended_the_thoughts_the_form_begins_at_once(server: LiveServer) -> None:
    fields = {"chat_template_kwargs": {"enable_thinking": False}, "logit_bias": {str(BEGIN): 100.0, str(END): 100.0}}
    message = told(server.chat("hello", max_tokens=20, regex="[a-z]{4}", **fields))
    assert re.fullmatch("[a-z]{4}", message["content"])
    assert "reasoning_content" not in message


def test_forced_calls_come_after_the_thoughts(server: LiveServer) -> None:
    fields = {"tools": [STOP], "tool_choice": "required", "parallel_tool_calls": False, "chat_template": DEEPSEEK}
    message = told(server.chat("hello", **fields, max_tokens=600, seed=0, logit_bias=THINKS))
    assert message["tool_calls"][0]["function"] == {"name": "stop", "arguments": "{}"}
    assert message["reasoning_content"]
    assert message["content"] is None


@pytest.mark.parametrize(
    ("source", "good", "bad"),
    [
        (Source("f", "json_schema", PERSON), '{"name":"a","age":1}', "a"),
        (Source("f", "regex", "[a-c]+"), "abc", "abd"),
        (Source("f", "choice", ["yes", "no"]), "yes", "maybe"),
        (Source("f", "grammar", 'start: "x" NAME\nNAME: /[a-z]+/'), "xy", "yx"),
        (Source("f", "grammar", 'root ::= "a" | b\nb ::= "bb"'), "bb", "c"),
        (Source("f", "structural_tag", json.dumps(TAGGED)), 'so <f>{"name":"a","age":1}</f>', "so <f>1</f>"),
    ],
)
def test_every_kind_of_grammar_may_follow_thoughts(source: Source, good: str, bad: str, tmp_path: Path) -> None:
    backend = thinking_tokenizer()
    backend.save(str(tmp_path / "tokenizer.json"))
    eos = backend.token_to_id(SPECIAL[2])
    tokenizer = LLTokenizer(str(tmp_path / "tokenizer.json"), n_vocab=backend.get_vocab_size(), eos_token=eos)
    tokens = ThoughtTokens(BEGIN, END, eos)

    def fits(text: str, *, inside: bool) -> bool:
        matcher = LLMatcher(tokenizer, after_thoughts(translated(source), tokens, inside=inside))
        assert not matcher.is_error(), matcher.get_error()
        ids = backend.encode(text).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    for inside in (True, False):
        assert fits(f'<think>So "x" 🌟 <think>\n</think>\n\n{good}', inside=inside)
        assert not fits(f"<think>So</think>{bad}", inside=inside)
        assert not fits("<think>So", inside=inside)
        assert not fits(f"<think>So{SPECIAL[2]}</think>{good}", inside=inside)
        assert fits(f"So </think>{good}", inside=inside) is inside
        assert fits(good, inside=inside) is not inside
