"""The chat templates of a server: its own, and those that adapters and requests bring."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from service.text.reasoning import ReasoningFamily
from service.text.reasoning import family_of as reasoning_of
from service.text.rendering import Conversation, names_in, render
from service.text.sandbox import TemplateSandbox
from service.tool_calls.syntax import SYNTAXES, Family, Syntax, family_of

LONG_CHAT = 10_000  # characters; rendering more takes longer than a few milliseconds
KEPT = 256  # templates that were parsed


class ChatTemplate(NamedTuple):
    """A chat template that parses, and what it says of its model."""

    text: str
    names: frozenset[str]  # that it uses
    trusted: bool  # it is the server's own
    family: Family  # of the model's tool calls
    reasoning: ReasoningFamily

    @property
    def syntax(self) -> Syntax:
        """How the model writes tool calls."""
        return SYNTAXES[self.family]


class ChatTemplates:
    """Knows the server's own template, and renders any.

    `own` has templates by name, as transformers knows them; `family` and `reasoning` override what templates say, and
    `environment` is that of the processes which render; None: that of this one.
    """

    def __init__(
        self,
        own: Mapping[str, str],
        special_tokens: Mapping[str, str],
        *,
        family: Family | None = None,
        reasoning: ReasoningFamily | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._own, self._special_tokens = own, special_tokens
        self._family, self._reasoning = family, reasoning
        self._sandbox = TemplateSandbox(environment=environment)
        self._parsed: dict[str, ChatTemplate] = {}  # the oldest first

    async def of(self, text: str | None, *, tools: bool = False) -> ChatTemplate | None:
        """The template of that text, else the server's own, which may be another with tools; None if it has none.

        Raises InvalidTemplate.
        """
        if text is None:
            text = (self._own.get("tool_use") if tools else None) or self._own.get("default")
        if not text:
            return None
        if text not in self._parsed:
            template = await asyncio.to_thread(self._parse, text)  # a third of a second for the worst ones
            self._parsed[text] = template
            if len(self._parsed) > KEPT:
                del self._parsed[next(iter(self._parsed))]
            return template
        return self._parsed[text]

    async def render(self, template: ChatTemplate, conversation: Conversation) -> str:
        """The prompt of a conversation. Raises InvalidChat.

        A template from outside has a process of its own; the server's own one does not, and a long conversation is
        rendered on a thread, so that it does not block the event loop.
        """
        given = Conversation(
            messages=conversation.messages,
            tools=conversation.tools,
            documents=conversation.documents,
            variables={**self._special_tokens, **conversation.variables},
            header=conversation.header,
            continued=conversation.continued,
        )
        if not template.trusted:
            return await self._sandbox.render(template.text, given)
        if not _long(given):
            return render(template.text, given)
        return await asyncio.to_thread(render, template.text, given)

    async def close(self) -> None:
        await self._sandbox.close()

    def _parse(self, text: str) -> ChatTemplate:
        return ChatTemplate(
            text,
            names_in(text),
            trusted=text in self._own.values(),
            family=self._family or family_of(text),
            reasoning=self._reasoning or reasoning_of(text),
        )


def _long(conversation: Conversation) -> bool:
    if sum(len(message.get("content") or "") for message in conversation.messages) >= LONG_CHAT:
        return True
    parts = (*conversation.messages, *conversation.tools, *conversation.documents)
    return sum(len(str(part)) for part in parts) >= LONG_CHAT


def template_text(given: str) -> str:
    """The template that an option gives: a file, or the text itself. Raises ValueError with a sentence."""
    if "{" in given:
        text = given
    else:
        try:
            text = Path(given).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ValueError(f"{given!r} is neither a template nor a file that can be read: {reason}") from None
    names_in(text)
    return text
