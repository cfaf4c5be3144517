"""The items of an answer as they grow, and the events that tell of them."""

from collections.abc import Iterator

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
    TextDelta,
    TextDone,
)


class Output:
    """The messages and calls of one answer. Events number themselves on from `next_number`."""

    def __init__(self, chat: Chat) -> None:
        self.items: list[OutputItem] = []  # those that are done
        self.next_number = 0
        self._chat, self._turn = chat, chat.turn(0)
        self._message: Message | None = None  # the item that grows: a message
        self._call: Call | None = None  # or a call
        self._untold: list[TokenLogprob] = []  # of tokens whose text is not decided on

    def number(self) -> int:
        """The number of the next event."""
        self.next_number += 1
        return self.next_number - 1

    def push(self, delta: Delta) -> Iterator[Event]:
        """The events of what the answer gains; they must be used up."""
        logprobs = self._chat.logprobs([delta])
        self._untold += logprobs.content if logprobs else ()
        for gained in self._turn.push(delta):
            if isinstance(gained, str):
                yield from self._say(gained)
            elif gained.id is not None:
                yield from self._begin_call(gained)
            else:
                yield from self._continue_call(gained)
        if delta.finish_reason is not None:
            yield from self._end("completed" if delta.finish_reason == "stop" else "incomplete")

    def _say(self, text: str) -> Iterator[Event]:
        if self._message is None:
            yield from self._close("completed")
            yield from self._begin_message()
        assert self._message is not None
        logprobs, self._untold = self._untold, []
        yield self._message.grow(self.number(), text, logprobs)

    def _begin_message(self) -> Iterator[Event]:
        self._message = message = Message(len(self.items))
        item = message.item("in_progress", with_part=False)
        yield ItemEvent(
            type="response.output_item.added",
            sequence_number=self.number(),
            output_index=message.index,
            item=item,
        )
        yield PartEvent(
            type="response.content_part.added",
            sequence_number=self.number(),
            item_id=message.id,
            output_index=message.index,
            part=message.part,
        )

    def _begin_call(self, begun: ToolCallDelta) -> Iterator[Event]:
        yield from self._close("completed")
        assert begun.id is not None
        assert begun.function.name is not None
        self._call = Call(len(self.items), begun.id, begun.function.name)
        self._untold = []  # the tokens of a call have no text to belong to
        yield ItemEvent(
            type="response.output_item.added",
            sequence_number=self.number(),
            output_index=self._call.index,
            item=self._call.item("in_progress"),
        )

    def _continue_call(self, more: ToolCallDelta) -> Iterator[Event]:
        assert self._call is not None
        self._call.arguments += more.function.arguments
        self._untold = []
        yield ArgumentsDelta(
            sequence_number=self.number(),
            item_id=self._call.id,
            output_index=self._call.index,
            delta=more.function.arguments,
        )

    def _end(self, status: ItemStatus) -> Iterator[Event]:
        """Close the last item; an answer of nothing is a message without text."""
        if (self._message is None and self._call is None and not self.items) or (self._message and self._untold):
            yield from self._say("")
        yield from self._close(status)

    def _close(self, status: ItemStatus) -> Iterator[Event]:
        if self._message is not None:
            yield from self._close_message(self._message, status)
        elif self._call is not None:
            yield from self._close_call(self._call, status)

    def _close_message(self, message: "Message", status: ItemStatus) -> Iterator[Event]:
        yield TextDone(
            sequence_number=self.number(),
            item_id=message.id,
            output_index=message.index,
            text=message.part.text,
            logprobs=message.part.logprobs,
        )
        yield PartEvent(
            type="response.content_part.done",
            sequence_number=self.number(),
            item_id=message.id,
            output_index=message.index,
            part=message.part,
        )
        self._message = None
        yield self._done(message.index, message.item(status))

    def _close_call(self, call: "Call", status: ItemStatus) -> Iterator[Event]:
        yield ArgumentsDone(
            sequence_number=self.number(),
            item_id=call.id,
            output_index=call.index,
            name=call.name,
            arguments=call.arguments,
        )
        self._call = None
        yield self._done(call.index, call.item(status))

    def _done(self, index: int, item: OutputItem) -> Event:
        self.items.append(item)
        return ItemEvent(type="response.output_item.done", sequence_number=self.number(), output_index=index, item=item)


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

    def item(self, status: ItemStatus, *, with_part: bool = True) -> MessageItem:
        return MessageItem(id=self.id, role="assistant", status=status, content=[self.part] if with_part else [])


class Call:
    """A call whose arguments grow."""

    def __init__(self, index: int, call_id: str, name: str) -> None:
        self.index, self.id = index, new_id("fc")
        self.call_id, self.name, self.arguments = call_id, name, ""

    def item(self, status: ItemStatus) -> CallItem:
        return CallItem(id=self.id, call_id=self.call_id, name=self.name, arguments=self.arguments, status=status)
