"""The items of a conversation: read from a request, and as the messages of a chat."""

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import msgspec

from service.errors import RequestError
from service.http import decode_json, encode_json
from service.openai.schemas import CalledFunction, Message, ToolCall
from service.responses.schemas import (
    CallItem,
    CallOutputItem,
    InputText,
    Item,
    MessageItem,
    OutputText,
    ReasoningItem,
    Refusal,
    SentCall,
    SentCallOutput,
    SentItem,
    SentItems,
    SentMessage,
    SentOutputText,
    SentPlainText,
    SentReasoning,
    SentReference,
    SentRefusal,
    SentText,
)

SentPart = SentText | SentPlainText | SentOutputText | SentRefusal


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid4().hex}"


def items_of(given: str | list[dict[str, Any]]) -> list[Item]:
    """The items of a request's input. Raises RequestError naming the item and its field."""
    if isinstance(given, str):
        return [_message(SentMessage(role="user", content=given))]
    typed = [item if item.get("type") else {**item, "type": "message"} for item in given]
    sent = decode_json(encode_json({"input": typed}), SentItems).input
    return [_item(item, f"input[{index}]") for index, item in enumerate(sent)]


def _item(sent: SentItem, place: str) -> Item:
    match sent:
        case SentMessage():
            return _message(sent)
        case SentCall():
            _check_arguments(sent.arguments, f"{place}.arguments")
            return CallItem(
                id=sent.id or new_id("fc"),
                call_id=sent.call_id,
                name=sent.name,
                arguments=sent.arguments,
                status="completed",
            )
        case SentCallOutput():
            output = sent.output if isinstance(sent.output, str) else "\n".join(part.text for part in sent.output)
            id = sent.id or new_id("fco")
            return CallOutputItem(id=id, call_id=sent.call_id, output=output, status="completed")
        case SentReference():
            message = f"{place}: item_reference is not supported: send the item itself, or previous_response_id"
            raise RequestError("unsupported_parameter", message, place)
        case SentReasoning():
            return ReasoningItem(
                id=sent.id or new_id("rs"),
                summary=sent.summary or [],
                content=sent.content or [],
                status="completed",
            )


def _message(sent: SentMessage) -> MessageItem:
    parts: Sequence[SentPart] = [SentText(text=sent.content)] if isinstance(sent.content, str) else sent.content
    content = [_part(part, written=sent.role == "assistant") for part in parts]
    return MessageItem(id=sent.id or new_id("msg"), role=sent.role, status="completed", content=content)


def _part(part: SentPart, *, written: bool) -> InputText | OutputText | Refusal:
    """A part of a message; `written` by the model, whatever its client calls it."""
    if isinstance(part, SentRefusal):
        return Refusal(refusal=part.refusal)
    return OutputText(text=part.text) if written else InputText(text=part.text)


def _check_arguments(text: str, field: str) -> None:
    try:
        msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise RequestError("invalid_field", f"{field} must be a JSON object as text: {error}", field) from None


def messages_of(items: Sequence[Item]) -> list[Message]:
    """The messages that a chat template is given.

    Calls belong to the assistant's message before them, thoughts to the one that they led to: without one they are
    left out, as those of an answer that was cut off.
    """
    messages: list[Message] = []
    thoughts: str | None = None  # of a message that is still to come
    for item in items:
        match item:
            case ReasoningItem():
                thoughts = "\n".join(part.text for part in item.content or item.summary) or None
                continue
            case MessageItem(role=role):
                # Chat templates know no developers
                role_name = "system" if role == "developer" else role
                own = thoughts if role == "assistant" else None
                messages.append(Message(role=role_name, content=_text(item), reasoning_content=own))
            case CallOutputItem():
                messages.append(Message(role="tool", content=item.output, tool_call_id=item.call_id))
            case CallItem():
                call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
                if not messages or messages[-1].role != "assistant" or thoughts is not None:
                    messages.append(Message(role="assistant", tool_calls=[], reasoning_content=thoughts))
                last = messages[-1]
                messages[-1] = msgspec.structs.replace(last, tool_calls=[*(last.tool_calls or ()), call])
        thoughts = None
    return messages


def _text(item: MessageItem) -> str:
    return "\n".join(part.refusal if isinstance(part, Refusal) else part.text for part in item.content)
