"""The items of an answer as they grow, and the events that tell of them."""

from collections.abc import Iterator
from typing import Literal

from service.openai.chat import Chat
from service.openai.generation import Delta
from service.openai.schemas import TokenLogprob, ToolCallDelta
from service.responses.items import new_id
from service.responses.schemas import (
    ArgumentsDelta,
    ArgumentsDone,
    CallItem,
    Event,
    ItemEvent,
    ItemStatus,
    MessageItem,
    OutputItem,
    OutputText,
    PartEvent,
    ReasoningDelta,
    ReasoningDone,
    ReasoningItem,
    ReasoningText,
    TextDelta,
    TextDone,
)


class Output:
    """The thoughts, messages and calls of one answer. Events number themselves on from `next_number`."""

    def __init__(self, chat: Chat) -> None:
        self.items: list[OutputItem] = []  # those that are done
        self.next_number = 0
        self._chat = chat
        self._growing: Thoughts | Message | Call | None = None
        self._untold: list[TokenLogprob] = []  # of tokens whose text is not decided on

    def number(self) -> int:
        """The number of the next event."""
        self.next_number += 1
        return self.next_number - 1

    def push(self, delta: Delta) -> Iterator[Event]:
        """The events of what the answer gains; they must be used up."""
        logprobs = self._chat.logprobs([delta])
        self._untold += logprobs.content if logprobs else ()
        turn = self._chat.turn(0)
        thought_before = turn.reasoning_tokens
        gains = turn.push(delta)
        if turn.reasoning_tokens > thought_before and not gains:
            self._untold = []  # log-probabilities are those of text
        if turn.thought and self._chat.tells_thoughts:
            yield from self._think(turn.thought)
        for gained in gains:
            if isinstance(gained, str):
                yield from self._say(gained)
            elif gained.id is not None:
                yield from self._begin_call(gained)
            else:
                yield from self._continue_call(gained)
        if delta.finish_reason is not None:
            yield from self._end("completed" if delta.finish_reason == "stop" else "incomplete")

    def _think(self, text: str) -> Iterator[Event]:
        if not isinstance(self._growing, Thoughts):
            yield from self._close("completed")
            yield from self._begin_text(Thoughts(len(self.items)))
        assert isinstance(self._growing, Thoughts)
        yield self._growing.grow(self.number(), text)

    def _say(self, text: str) -> Iterator[Event]:
        if not isinstance(self._growing, Message):
            yield from self._close("completed")
            yield from self._begin_text(Message(len(self.items)))
        assert isinstance(self._growing, Message)
        logprobs, self._untold = self._untold, []
        yield self._growing.grow(self.number(), text, logprobs)

    def _begin_text(self, begun: "Thoughts | Message") -> Iterator[Event]:
        self._growing = begun
        yield self._added(begun.index, begun.item("in_progress", with_part=False))
        yield self._part("response.content_part.added", begun)

    def _begin_call(self, begun: ToolCallDelta) -> Iterator[Event]:
        yield from self._close("completed")
        assert begun.id is not None
        assert begun.function.name is not None
        self._growing = call = Call(len(self.items), begun.id, begun.function.name)
        self._untold = []  # the tokens of a call have no text to belong to
        yield self._added(call.index, call.item("in_progress"))

    def _continue_call(self, more: ToolCallDelta) -> Iterator[Event]:
        assert isinstance(self._growing, Call)
        self._untold = []
        yield self._growing.grow(self.number(), more.function.arguments)

    def _end(self, status: ItemStatus) -> Iterator[Event]:
        """Close the last item; an answer of nothing is a message without text."""
        nothing = self._growing is None and not self.items
        if nothing or (isinstance(self._growing, Message) and self._untold):
            yield from self._say("")
        yield from self._close(status)

    def _close(self, status: ItemStatus) -> Iterator[Event]:
        """End the item that grows, if there is one."""
        ended, self._growing = self._growing, None
        if ended is None:
            return
        yield ended.done(self.number())
        if not isinstance(ended, Call):
            yield self._part("response.content_part.done", ended)
        item = ended.item(status)
        self.items.append(item)
        yield ItemEvent(
            type="response.output_item.done",
            sequence_number=self.number(),
            output_index=ended.index,
            item=item,
        )

    def _added(self, index: int, item: OutputItem) -> Event:
        return ItemEvent(
            type="response.output_item.added", sequence_number=self.number(), output_index=index, item=item
        )

    def _part(
        self, kind: Literal["response.content_part.added", "response.content_part.done"], of: "Thoughts | Message"
    ) -> Event:
        return PartEvent(type=kind, sequence_number=self.number(), item_id=of.id, output_index=of.index, part=of.part)


class Thoughts:
    """What a reasoning model thinks before it answers, as it grows."""

    def __init__(self, index: int) -> None:
        self.index, self.id = index, new_id("rs")
        self._text = ""

    @property
    def part(self) -> ReasoningText:
        return ReasoningText(text=self._text)

    def grow(self, number: int, text: str) -> Event:
        self._text += text
        return ReasoningDelta(sequence_number=number, item_id=self.id, output_index=self.index, delta=text)

    def done(self, number: int) -> Event:
        return ReasoningDone(sequence_number=number, item_id=self.id, output_index=self.index, text=self._text)

    def item(self, status: ItemStatus, *, with_part: bool = True) -> ReasoningItem:
        return ReasoningItem(id=self.id, content=[self.part] if with_part else [], status=status)


class Message:
    """A message that grows."""

    def __init__(self, index: int) -> None:
        self.index, self.id = index, new_id("msg")
        self._text, self._logprobs = "", list[TokenLogprob]()

    @property
    def part(self) -> OutputText:
        return OutputText(text=self._text, logprobs=list(self._logprobs))

    def grow(self, number: int, text: str, logprobs: list[TokenLogprob]) -> Event:
        self._text += text
        self._logprobs += logprobs
        return TextDelta(
            sequence_number=number, item_id=self.id, output_index=self.index, delta=text, logprobs=logprobs
        )

    def done(self, number: int) -> Event:
        part = self.part
        return TextDone(
            sequence_number=number,
            item_id=self.id,
            output_index=self.index,
            text=part.text,
            logprobs=part.logprobs,
        )

    def item(self, status: ItemStatus, *, with_part: bool = True) -> MessageItem:
        return MessageItem(id=self.id, role="assistant", status=status, content=[self.part] if with_part else [])


class Call:
    """A call whose arguments grow."""

    def __init__(self, index: int, call_id: str, name: str) -> None:
        self.index, self.id = index, new_id("fc")
        self.call_id, self.name, self.arguments = call_id, name, ""

    def grow(self, number: int, arguments: str) -> Event:
        self.arguments += arguments
        return ArgumentsDelta(sequence_number=number, item_id=self.id, output_index=self.index, delta=arguments)

    def done(self, number: int) -> Event:
        return ArgumentsDone(
            sequence_number=number,
            item_id=self.id,
            output_index=self.index,
            name=self.name,
            arguments=self.arguments,
        )

    def item(self, status: ItemStatus) -> CallItem:
        return CallItem(id=self.id, call_id=self.call_id, name=self.name, arguments=self.arguments, status=status)
