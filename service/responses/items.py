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
    items = [_item(item, f"input[{index}]") for index, item in enumerate(sent)]
    return [item for item in items if item is not None]


def _item(sent: SentItem, place: str) -> Item | None:
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
            return None


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
    """The messages that a chat template is given: calls belong to the assistant's message before them."""
    messages: list[Message] = []
    for item in items:
        match item:
            case MessageItem(role=role):
                # Chat templates know no developers
                role_name = "system" if role == "developer" else role
                messages.append(Message(role=role_name, content=_text(item)))
            case CallOutputItem():
                messages.append(Message(role="tool", content=item.output, tool_call_id=item.call_id))
            case CallItem():
                call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
                if not messages or messages[-1].role != "assistant":
                    messages.append(Message(role="assistant", tool_calls=[]))
                last = messages[-1]
                messages[-1] = msgspec.structs.replace(last, tool_calls=[*(last.tool_calls or ()), call])
    return messages


def _text(item: MessageItem) -> str:
    return "\n".join(part.refusal if isinstance(part, Refusal) else part.text for part in item.content)
