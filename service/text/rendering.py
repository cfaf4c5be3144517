"""Rendering a chat template to the text that transformers would make."""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 16 << 20  # of a prompt: as many as the largest body has by default
KEPT = 64  # compiled templates
# Where the last message of a conversation ends that is to be continued; templates may strip the space
_OPEN = "<|rootstock: the last message ends here|> "
# What a template's code may raise
FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


class InvalidTemplate(ValueError):
    """A chat template does not parse; the error's text begins with the line."""


class InvalidChat(ValueError):
    """A chat template refuses a conversation, or runs for too long; the error's text says which."""


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """What a template makes a prompt of."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] = ()
    documents: Sequence[dict[str, Any]] = ()
    variables: dict[str, Any] = {}  # further ones, the special tokens among them
    header: bool = True  # of the assistant's answer, after the messages
    continued: bool = False  # the last message is left open


def names_in(template: str) -> frozenset[str]:
    """The names that a template reads or writes, found without running any of it. Raises InvalidTemplate."""
    try:
        return frozenset(node.name for node in _ENVIRONMENT.parse(template).find_all(nodes.Name))
    except jinja2.TemplateSyntaxError as error:
        raise InvalidTemplate(f"line {error.lineno}: {error.message}") from None
    except RecursionError:
        raise InvalidTemplate("line 1: its expressions are nested too deeply") from None
    except FAILURES as error:
        raise InvalidTemplate(f"line 1: {error}") from None


def render(template: str, conversation: Conversation) -> str:
    """The prompt. Raises InvalidChat."""
    messages = [_with_thoughts(message) for message in conversation.messages]
    last = messages[-1]
    if conversation.continued:
        messages[-1] = {**last, "content": last["content"] + _OPEN}
    pieces, length = [], 0
    try:
        for piece in _compiled(template).generate(
            **{
                **conversation.variables,
                "messages": messages,
                "tools": list(conversation.tools) or None,
                "documents": list(conversation.documents) or None,
                "add_generation_prompt": conversation.header,
            }
        ):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHARACTERS:
                break
    except MemoryError:
        raise InvalidChat("the chat template needs too much memory for these messages") from None
    except FAILURES as error:
        raise InvalidChat(f"the chat template refuses these messages: {error or type(error).__name__}") from None
    if length > MAX_CHARACTERS:
        raise InvalidChat(f"the chat template makes more than {MAX_CHARACTERS} characters of these messages")
    text = "".join(pieces)
    return _left_open(text, last["content"], template) if conversation.continued else text


def _left_open(text: str, content: str, template: str) -> str:
    """A prompt up to where the content of its last message ends."""
    place = text.find(_OPEN.strip())
    if text.count(_OPEN.strip()) != 1 or content.strip() not in text or "content" not in template:
        raise InvalidChat(
            "continue_final_message: the chat template does not show the content of the last message once as it is"
        )
    whole = text.startswith(_OPEN, place)  # else the template has stripped the content
    return text[:place] if whole else text[:place].rstrip()


def _with_thoughts(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose thoughts have both names that templates know."""
    thoughts = message.get("reasoning_content")
    return dict(message) if thoughts is None else {"thinking": thoughts, **message}


class _Generation(Extension):
    """Marks what the assistant says, for those who train; here it is only text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Variables that a template may set from inside a loop; none of Python's own."""

    def __init__(*arguments: Any, **values: Any) -> None:
        self, *rest = arguments  # so that a variable may be called self
        given = dict(*rest, **values)
        for name in given:
            _refuse_internal(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_internal(name)
        super().__setitem__(name, value)


def _refuse_internal(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the variable {name!r} of a namespace must not begin with an underscore")


def _raise(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models are shown it: Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dict:
    """Makes dicts, and leads to nothing of Python's own."""

    def __call__(self, *arguments: Any, **values: Any) -> dict[Any, Any]:
        return dict(*arguments, **values)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


_ENVIRONMENT = _environment()


@lru_cache(KEPT)
def _compiled(template: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(template)
