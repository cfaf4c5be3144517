"""Chat templates give the text that transformers makes of them, and no more than their limits allow."""

import asyncio
import itertools
import os
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from service.text import rendering, sandbox
from service.text.chat_templates import ChatTemplates, template_text
from service.text.rendering import Conversation, InvalidChat, InvalidTemplate, names_in, render
from service.text.sandbox import TemplateSandbox
from service.text.tokenizer import Tokenizer
from tests.service.text.reasoning_templates import DEEPSEEK, QWEN

MESSAGES = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "  What is 12 + 7?\n"},
    {"role": "assistant", "content": "19 ", "reasoning_content": "A sum."},
    {"role": "user", "content": "Grüße! <|im_end|> 😀"},
]
CALLED = [
    {"role": "user", "content": "And the weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": {"city": "Köln <3"}}}],
    },
    {"role": "tool", "content": "rain", "tool_call_id": "a"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
DOCUMENTS = [{"title": "A", "text": "aa"}, {"title": "B", "text": "bb"}]
TEMPLATES = {
    "qwen": QWEN,
    "deepseek": DEEPSEEK,
    "blocks": "{% for m in messages %}\n  "
    "{% if m.role == 'user' %}\n    {{ m.content }}\n  {% endif %}\n{% endfor %}\n",
    "documents": "{{ documents | length if documents is not none else tools is none }}"
    "{% for document in documents or [] %}[{{ document.title }}] {{ document['text'] }}{% endfor %}",
    "globals": "{{ dict(a=1, b=messages) | tojson(indent=2) }}{{ dict.fromkeys([1, 2], 'x') }}"
    "{% set ns = namespace(found=false) %}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% set ns.found = m.role %}{% endfor %}{{ ns.found }}{{ messages | map(attribute='role') | join(',') }}",
    "generation": "{% for m in messages %}{% set x = m.content %}{% generation %}{{ x }}{% set x = 'lost' %}"
    "{% endgeneration %}{{ 'lost' if x == 'lost' }}{% endfor %}",
    "thinking": "{{ messages[-1].thinking }}|{{ messages[-1].reasoning_content }}|{{ bos_token }}{{ eos_token }}|"
    "{{ extra }}",
    "json": "{{ messages | tojson(sort_keys=true, separators=(',', ':')) }}{{ 'ä<&' | tojson(ensure_ascii=true) }}",
    "open": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
}
CASES: list[dict[str, Any]] = [
    {"messages": MESSAGES},
    {"messages": MESSAGES, "header": False},
    {"messages": MESSAGES[:3], "header": False, "continued": True},
    {"messages": [*MESSAGES[:2], {"role": "assistant", "content": "It is 1"}], "header": False, "continued": True},
    {"messages": CALLED, "tools": TOOLS},
    {"messages": MESSAGES, "documents": DOCUMENTS, "variables": {"enable_thinking": False, "extra": [1]}},
    {"messages": MESSAGES[1:], "variables": {"enable_thinking": True, "eos_token": "other"}},
]


@pytest.fixture(scope="module")
def oracle(tiny_model: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_model)


def rendered(template: str, case: dict[str, Any], oracle: PreTrainedTokenizerFast) -> str:
    variables = {**oracle.special_tokens_map, **case.get("variables", {})}
    return render(template, Conversation(**{**case, "variables": variables}))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("case", CASES)
def test_a_prompt_is_what_transformers_makes(name: str, case: dict[str, Any], oracle: PreTrainedTokenizerFast) -> None:
    def expected() -> str:
        return oracle.apply_chat_template(
            case["messages"],
            tools=case.get("tools"),
            documents=case.get("documents"),
            chat_template=TEMPLATES[name],
            add_generation_prompt=case.get("header", True),
            continue_final_message=case.get("continued", False),
            tokenize=False,
            **case.get("variables", {}),
        )

    try:
        text = expected()
    except ValueError:
        assert case.get("continued"), "transformers refuses the case"
        with pytest.raises(InvalidChat, match="continue_final_message"):
            rendered(TEMPLATES[name], case, oracle)
        return
    assert rendered(TEMPLATES[name], case, oracle) == text


def test_the_tokens_of_the_default_models_chats_are_those_of_transformers(default_model_path: Path) -> None:
    tokenizer = Tokenizer(default_model_path)
    oracle = PreTrainedTokenizerFast.from_pretrained(default_model_path)

    async def tokens(messages: list[dict[str, Any]], *, header: bool) -> list[int]:
        templates = ChatTemplates(tokenizer.chat_templates, tokenizer.special_tokens)
        template = await templates.of(None)
        assert template is not None
        text = await templates.render(template, Conversation(messages=messages, header=header))
        [token_ids] = await tokenizer.encode_texts([text], add_special_tokens=False)
        return token_ids

    long = [{"role": "user", "content": "The quick brown fox. " * 2000}]  # rendered on a thread
    for messages, header in itertools.product((MESSAGES, MESSAGES[:2], MESSAGES[1:2], long), (True, False)):
        expected = oracle.apply_chat_template(messages, add_generation_prompt=header, return_dict=False)
        assert asyncio.run(tokens(messages, header=header)) == expected


def test_an_open_message_ends_where_its_content_does(oracle: PreTrainedTokenizerFast) -> None:
    case = {"messages": [{"role": "assistant", "content": "It is 1 "}], "header": False, "continued": True}
    assert rendered("{{ messages[0].content }}<end>", case, oracle) == "It is 1 "
    assert rendered("{{ messages[0].content | trim }}<end>", case, oracle) == "It is 1"
    assert render(TEMPLATES["open"], Conversation(**case)) == "<assistant>It is 1"
    for template in ("{{ messages[0].content }}, {{ messages[0].content }}", "{{ messages[0].content[3:] }}", "x"):
        with pytest.raises(InvalidChat, match="continue_final_message"):
            render(template, Conversation(**case))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no critics') }}", "no critics"),
        ("{{ messages[7].content + 'x' }}", "has no element 7"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ messages.append(1) }}", "is not safely callable|access to attribute"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{% set ns = namespace(__class__=1) %}", "underscore"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_the_chats_error(template: str, reason: str) -> None:
    with pytest.raises(InvalidChat, match=reason):
        render(template, Conversation(messages=MESSAGES))


def test_a_template_that_does_not_parse_says_its_line() -> None:
    for template, line in (
        ("a\n{% if %}", 2),
        ("\n\n{{ x", 3),
        ("{{ " + "(" * 5000, 1),
        ("{{ " + "9" * 5000 + " }}", 1),
    ):
        with pytest.raises(InvalidTemplate, match=f"^line {line}: "):
            names_in(template)


def test_the_names_of_a_template_are_those_that_it_uses() -> None:
    assert names_in("documents {{ messages }}{% if tools %}{{ x.documents }}{% endif %}") == {"messages", "tools", "x"}


def test_an_option_is_a_file_or_the_text(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ 'ä' }}", "utf-8")
    assert template_text(str(tmp_path / "t.jinja")) == template_text("{{ 'ä' }}")
    for wrong, reason in ((str(tmp_path / "none.jinja"), "No such file"), ("a\n{{", "line 2"), (str(tmp_path), "Is a")):
        with pytest.raises(ValueError, match=reason):
            template_text(wrong)


def in_sandbox(template: str, seconds: float = 5.0, **fields: Any) -> str:
    async def run() -> str:
        processes = TemplateSandbox(seconds)
        try:
            return await processes.render(template, Conversation(**{"messages": MESSAGES, **fields}))
        finally:
            await processes.close()

    return asyncio.run(run())


@pytest.mark.parametrize("case", CASES[:6])
def test_a_prompt_of_the_sandbox_is_the_same(case: dict[str, Any]) -> None:
    assert in_sandbox(QWEN, **case) == render(QWEN, Conversation(**case))


LOOP = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template", [LOOP, "{{ lipsum(n=100000000) }}"])
def test_a_template_that_runs_for_too_long_is_ended(template: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(InvalidChat, match=r"takes longer than 0\.2 s"):
        in_sandbox(template, 0.2)
    assert time.perf_counter() - begun < 10


def test_a_template_that_wants_too_much_memory_does_not_get_it() -> None:
    for template in ("{{ 'x' * 10**10 }}", "{{ '%2000000000d' | format(1) }}"):
        with pytest.raises(InvalidChat, match="too much memory"):
            in_sandbox(template)


@pytest.mark.parametrize(
    "template", ["{{ 'x' * (17 * 1024 * 1024) }}", "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}"]
)
def test_a_prompt_that_is_too_long_is_refused(template: str) -> None:
    with pytest.raises(InvalidChat, match=f"more than {rendering.MAX_CHARACTERS} characters"):
        in_sandbox(template)


def test_the_event_loop_goes_on_and_other_prompts_are_rendered_meanwhile() -> None:
    async def run() -> tuple[float, int, list[str]]:
        processes, longest, ticks, good = TemplateSandbox(0.5), 0.0, 0, Conversation(messages=MESSAGES)
        await processes.render("{{ 1 }}", good)
        endless = asyncio.create_task(processes.render(LOOP, good))
        texts, last = [], time.perf_counter()
        while not endless.done():
            texts.append(await processes.render("{{ messages | length }}", good))
            await asyncio.sleep(0.005)
            now = time.perf_counter()
            longest, last, ticks = max(longest, now - last), now, ticks + 1
        with pytest.raises(InvalidChat, match="takes longer"):
            await endless
        await processes.close()
        return longest, ticks, texts

    longest, ticks, texts = asyncio.run(run())
    assert set(texts) == {str(len(MESSAGES))}
    assert ticks > 5
    assert longest < 0.4  # a loop that waited for the template would stand still for half a second


def test_who_goes_away_leaves_no_process_behind() -> None:
    async def run() -> list[int]:
        processes = TemplateSandbox(60)
        waiting = [asyncio.create_task(processes.render(LOOP, Conversation(messages=MESSAGES))) for _ in range(3)]
        started: list[int] = []
        while len(started) < 3:
            await asyncio.sleep(0.05)
            started = children()
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert await processes.render("{{ 1 }}", Conversation(messages=MESSAGES)) == "1"
        await processes.close()
        return sorted({*started} & {*children()})

    assert asyncio.run(run()) == []


def children() -> list[int]:
    """The processes of this one that render templates."""
    found = []
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if b"template_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(int(pid))
    return found


def test_at_most_a_few_processes_run() -> None:
    async def run() -> int:
        processes = TemplateSandbox()
        texts = await asyncio.gather(*(processes.render("{{ 1 }}", Conversation(messages=MESSAGES)) for _ in range(20)))
        assert set(texts) == {"1"}
        count = len(children())
        await processes.close()
        return count

    assert 1 <= asyncio.run(run()) <= sandbox.PLACES


def test_templates_are_those_of_names_texts_and_tools() -> None:
    async def run() -> None:
        none = ChatTemplates({}, {})
        assert await none.of(None) is None
        brought = await none.of("{{ '</think><tool_call>' }}")
        assert brought is not None
        assert (brought.trusted, brought.family, brought.reasoning) == (False, "hermes", "qwen3")
        several = ChatTemplates({"default": "a", "tool_use": "[TOOL_CALLS]"}, {}, reasoning="deepseek_r1")
        found = [await several.of(None), await several.of(None, tools=True), await several.of("a", tools=True)]
        assert [(each and (each.text, each.family, each.trusted, each.reasoning)) for each in found] == [
            ("a", "hermes", True, "deepseek_r1"),
            ("[TOOL_CALLS]", "mistral", True, "deepseek_r1"),
            ("a", "hermes", True, "deepseek_r1"),
        ]

    asyncio.run(run())
