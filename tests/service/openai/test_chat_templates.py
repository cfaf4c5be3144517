"""Chat templates over HTTP: the server's, a request's, and what requests tell them.

The fake engine's answer is the prompt over again, so an answer of the prompt's length shows the rendered text.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.text.chat_templates import template_text
from tests.service.live_server import NAME, LiveServer, fake_settings, live_server
from tests.service.text.reasoning_templates import QWEN

SHORT = QWEN.replace("<|im_start|>", "<s>").replace("<|im_end|>", "<e>")  # for a context of 200 bytes
SHOWN = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}{% if add_generation_prompt %}me={% endif %}"


@pytest.fixture(scope="module")
def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """It takes templates from requests, and its own is of the option."""
    data = tmp_path_factory.mktemp("data")
    (data / "own.jinja").write_text(SHOWN + "{# developer #}")
    settings = fake_settings(
        tiny_model, data, allow_request_chat_template=True, chat_template=template_text(str(data / "own.jinja"))
    )
    with live_server(settings) as running:
        yield running


def prompt_of(live: LiveServer, messages: list[dict[str, Any]], **fields: Any) -> str:
    """The text that /tokenize makes of a chat; a chat answers with the same."""
    tokens = live.post("/tokenize", messages=messages, **fields).json()["tokens"]
    text: str = live.post("/detokenize", tokens=tokens).json()["prompt"]
    body = {"model": NAME, "messages": messages, "max_tokens": len(tokens), "ignore_eos": True, **fields}
    answer = live.post("/v1/chat/completions", separate_reasoning=False, skip_special_tokens=False, **body).json()
    assert answer["usage"]["prompt_tokens"] == len(tokens)
    assert answer["choices"][0]["message"]["content"] == text
    return text


def refused(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def ask(live: LiveServer, **fields: Any) -> httpx.Response:
    return live.post("/v1/chat/completions", **{"model": NAME, "messages": [USER], "max_tokens": 4, **fields})


USER = {"role": "user", "content": "hello"}


def test_the_option_replaces_the_models_template(live: LiveServer) -> None:
    assert prompt_of(live, [USER]) == "user=hello;me="


def test_a_request_may_bring_a_template_where_it_is_allowed(live: LiveServer, server: LiveServer) -> None:
    assert prompt_of(live, [USER], chat_template="{{ messages[0].content * 2 }}") == "hellohello"
    for path in ("/v1/chat/completions", "/tokenize"):
        response = server.post(path, model=NAME, messages=[USER], chat_template="{{ messages }}")
        assert refused(response) == (400, "unsupported_parameter", "chat_template")
        assert "--allow-request-chat-template" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("a\n\n{{ 'b", "line 3"),
        ("{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}", "longer than 2 s"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{{ 'x' * 10**10 }}", "too much memory"),
        ("{{ raise_exception('not you') }}", "not you"),
    ],
)
def test_a_requests_template_that_does_not_work_is_the_requests_error(
    live: LiveServer, template: str, reason: str
) -> None:
    response = ask(live, chat_template=template)
    assert refused(response)[:2] == (400, "invalid_chat")
    assert reason in response.json()["error"]["message"]
    assert prompt_of(live, [USER]) == "user=hello;me="


def test_a_template_of_no_tokens_or_too_many_characters_is_refused(live: LiveServer) -> None:
    assert refused(ask(live, chat_template="{# nothing #}")) == (400, "empty_prompt", "messages")
    assert refused(ask(live, chat_template="x" * (65 << 10))) == (400, "invalid_field", "chat_template")
    assert refused(ask(live, chat_template="")) == (400, "invalid_field", "chat_template")


def test_variables_reach_the_template(live: LiveServer) -> None:
    template = "{{ enable_thinking is defined }},{{ style }},{{ eos_token }},{{ reasoning_effort }}"
    given = {"style": {"a": [1]}, "eos_token": "E"}
    assert prompt_of(live, [USER], chat_template=template, chat_template_kwargs=given) == "False,{'a': [1]},E,"
    assert prompt_of(live, [USER], chat_template=template, reasoning_effort="low") == "False,,<|end|>,low"
    both = {"chat_template_kwargs": {"reasoning_effort": "high"}, "reasoning_effort": "low"}
    assert prompt_of(live, [USER], chat_template=template, **both) == "False,,<|end|>,high"
    assert prompt_of(live, [USER], reasoning_effort="low", chat_template_kwargs={}) == "user=hello;me="
    switch = "{{ enable_thinking }}"
    assert prompt_of(live, [USER], chat_template=switch, reasoning_effort="none") == "False"
    assert prompt_of(live, [USER], chat_template="{{ style }}", chat_template_kwargs={"style": 2**70}) == str(2**70)


@pytest.mark.parametrize("name", ["messages", "tools", "documents", "add_generation_prompt", "chat_template"])
def test_a_variable_cannot_stand_for_a_field(live: LiveServer, name: str) -> None:
    response = ask(live, chat_template_kwargs={name: []})
    assert refused(response) == (400, "invalid_field", f"chat_template_kwargs.{name}")
    assert f"send {name} as a field" in response.json()["error"]["message"]


def test_documents_are_for_templates_that_use_them(live: LiveServer) -> None:
    template = "{% for d in documents or [] %}[{{ d.title }}]{% endfor %}."
    assert prompt_of(live, [USER], chat_template=template, documents=[{"title": "A"}, {"title": "B"}]) == "[A][B]."
    assert prompt_of(live, [USER], chat_template=template, documents=[]) == "."
    response = ask(live, documents=[{"title": "A", "text": "a"}])
    assert refused(response) == (400, "unsupported_parameter", "documents")
    assert refused(ask(live, documents=["A"])) == (400, "invalid_field", "documents[0]")


def test_the_header_may_be_left_out_or_the_last_message_continued(live: LiveServer) -> None:
    begun = [USER, {"role": "assistant", "content": "It is 1"}]
    assert prompt_of(live, [USER], add_generation_prompt=False) == "user=hello;"
    assert prompt_of(live, begun, add_generation_prompt=True) == "user=hello;assistant=It is 1;me="
    for fields in ({}, {"add_generation_prompt": False}):
        assert prompt_of(live, begun, continue_final_message=True, **fields) == "user=hello;assistant=It is 1"
    response = ask(live, continue_final_message=True, add_generation_prompt=True)
    assert refused(response) == (400, "invalid_field", "add_generation_prompt")
    template = "{{ messages[0].content | upper }}"
    response = ask(live, continue_final_message=True, chat_template=template)
    assert refused(response) == (400, "invalid_chat", "messages")
    assert "continue_final_message" in response.json()["error"]["message"]


def test_every_role_may_have_parts_and_a_refusal_is_text(live: LiveServer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": role, "content": parts} for role in ("system", "developer", "user", "assistant", "tool")]
    text = "system=a\nb;developer=a\nb;user=a\nb;assistant=a\nb;tool=a\nb;me="
    assert prompt_of(live, messages) == text
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    assert prompt_of(live, [USER, refusal, USER]) == "user=hello;assistant=no;user=hello;me="
    plain = {"role": "assistant", "content": None, "refusal": "no"}
    assert prompt_of(live, [USER, plain]) == "user=hello;assistant=no;me="
    assert refused(ask(live, messages=[{"role": "user", "content": [{"type": "refusal"}]}]))[2] == (
        "messages[0].content[0].refusal"
    )


def test_a_developer_is_the_system_for_a_template_that_knows_none(live: LiveServer) -> None:
    said = [{"role": "developer", "content": "be brief"}, USER]
    assert prompt_of(live, said) == "developer=be brief;user=hello;me="
    assert prompt_of(live, said, chat_template=SHOWN) == "system=be brief;user=hello;me="


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_earlier_thoughts_reach_the_template(live: LiveServer, name: str) -> None:
    template = "{% for m in messages %}{{ m.role }}[{{ m.reasoning_content }}|{{ m.thinking }}]{% endfor %}"
    said = [USER, {"role": "assistant", "content": "4", name: "2+2"}, USER]
    assert prompt_of(live, said, chat_template=template) == "user[|]assistant[2+2|2+2]user[|]"
    assert "<think>\n2+2\n</think>\n\n4<e>" in prompt_of(live, said[:2], chat_template=SHORT)


# What the model would write comes from the prompt: the fake engine repeats it
THINKS = "{# <think></think> #}{{ messages[0].content }}"


def told(response: httpx.Response) -> list[dict[str, Any]]:
    """The choices' messages, however they came."""
    assert response.status_code == 200, response.text
    if not response.headers["content-type"].startswith("text/event-stream"):
        return [
            {**choice["message"], "finish_reason": choice["finish_reason"]} for choice in response.json()["choices"]
        ]
    found: dict[int, dict[str, Any]] = {}
    for line in response.text.splitlines():
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line[6:])["choices"]:
            message = found.setdefault(choice["index"], {"content": None})
            assert choice["delta"].get("reasoning") == choice["delta"].get("reasoning_content")
            for name in ("content", "reasoning_content", "reasoning"):
                if piece := choice["delta"].get(name):
                    message[name] = (message.get(name) or "") + piece
            message["tool_calls"] = message.get("tool_calls", []) + choice["delta"].get("tool_calls", [])
            message["finish_reason"] = choice["finish_reason"]
    return [found[index] for index in sorted(found)]


def thoughts_of(live: LiveServer, text: str, **fields: Any) -> list[tuple[str | None, str | None]]:
    body = {"messages": [{"role": "user", "content": text}], "chat_template": THINKS, "ignore_eos": True, **fields}
    length = live.post("/tokenize", prompt=text).json()["count"]
    return [
        (message.get("reasoning_content"), message["content"])
        for message in told(ask(live, **{"max_tokens": length, **body}))
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_have_a_field_of_their_own(live: LiveServer, stream: bool) -> None:
    text = "<think>\nTwo and two, 🌟.\n</think>\n\nFour 🌟."
    assert thoughts_of(live, text, stream=stream, n=2) == [("Two and two, 🌟.", "Four 🌟.")] * 2
    assert thoughts_of(live, "Four.", stream=stream) == [(None, "Four.")]
    assert thoughts_of(live, text, stream=stream, include_reasoning=False) == [(None, "Four 🌟.")]
    assert thoughts_of(live, text, stream=stream, separate_reasoning=False) == [(None, text)]
    cut_off = thoughts_of(live, text, stream=stream, max_tokens=12)
    assert cut_off == [("Two ", None)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_may_begin_the_thoughts_or_end_them(live: LiveServer, stream: bool) -> None:
    assert thoughts_of(live, "2+2</think>4<think>\n", stream=stream) == [("2+2", "4<think>\n")]
    closed = "<think>2+2</think>4<think>\n\n</think>\n\n"
    assert thoughts_of(live, closed, stream=stream) == [(None, closed)]
    thinking = {"chat_template": SHORT, "max_tokens": 50, "stream": stream}
    [(reasoning, content)] = thoughts_of(live, "a", **thinking, chat_template_kwargs={"enable_thinking": False})
    assert reasoning is None
    assert content is not None
    assert content.startswith("<s>user\na<e>\n<s>assistant\n<think>\n\n</think>\n\n")
    # the answer of a message that is continued inside its thoughts
    said = [{"role": "assistant", "content": "<think>So 4</think>4 <think>and"}]
    assert thoughts_of(live, "<think>So 4</think>4 <think>and", messages=said, continue_final_message=True) == [
        ("So 4", "4 <think>and")
    ]
    said = [{"role": "assistant", "content": "<think>a</think>b"}]
    assert thoughts_of(live, "<think>a</think>b", messages=said, continue_final_message=True) == [
        (None, "<think>a</think>b")
    ]


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize("stream", [False, True])
def test_calls_come_after_thoughts_and_none_are_found_in_them(live: LiveServer, stream: bool) -> None:
    text = '<think><tool_call>{"name": "no"}</think>Now.<tool_call>{"name": "f", "arguments": {"x":1}}</tool_call>'
    template = "{# tools tool_calls #}" + THINKS
    body = {"messages": [{"role": "user", "content": text}], "chat_template": template, "tools": [TOOL]}
    length = live.post("/tokenize", prompt=text).json()["count"]
    [message] = told(ask(live, **body, max_tokens=length, stream=stream))
    assert message["reasoning_content"] == '<tool_call>{"name": "no"}'
    assert message["content"].strip() == "Now."
    names = [call["function"].get("name") for call in message["tool_calls"]]
    assert [name for name in names if name] == ["f"]
    assert "".join(call["function"]["arguments"] for call in message["tool_calls"]) == '{"x":1}'


def test_where_the_tags_are_no_tokens_a_form_holds_from_the_first_token_on(live: LiveServer) -> None:
    text = "<think>a</think>b"
    assert thoughts_of(live, text, regex=".*") == [(None, text)]
    assert thoughts_of(live, text, response_format={"type": "text"}) == [("a", "b")]


def test_the_option_names_the_reasoning_of_any_template(tiny_model: Path, tmp_path: Path) -> None:
    for parser, expected in (("deepseek_r1", ("2+2", "4")), ("qwen3", (None, "2+2</think>4")), ("none", None)):
        settings = fake_settings(tiny_model, tmp_path, allow_request_chat_template=True, reasoning_parser=parser)
        with live_server(settings) as running:
            text = "<think>2+2</think>4" if expected is None else "2+2</think>4"
            assert thoughts_of(running, text, chat_template=THINKS) == [expected or (None, text)]


def test_a_model_without_a_template_says_what_to_do(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    with live_server(fake_settings(tmp_path, tmp_path / "data")) as running:
        response = ask(running)
        assert refused(response) == (400, "invalid_chat", "messages")
        assert "--chat-template" in response.json()["error"]["message"]
        assert running.complete("hello", max_tokens=1).status_code == 200
