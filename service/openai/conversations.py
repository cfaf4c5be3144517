"""A request's messages and what else its chat template is told, as templates know them."""

from collections.abc import Sequence
from typing import Any

import msgspec

from service.errors import RequestError
from service.openai.sampling_params import refuse_unbuilt
from service.openai.schemas import ChatRequest, Message, RefusalPart, TemplateFields, TokenizeRequest, Tool, ToolCall
from service.openai.tool_choice import as_json, calls_as_text, with_description
from service.text.chat_templates import ChatTemplate
from service.text.rendering import Conversation

OWN_FIELDS = frozenset(TemplateFields.__struct_fields__) | {"messages", "tools"}


def template_fields(body: ChatRequest | TokenizeRequest) -> TemplateFields:
    """What a request says of its template. Raises RequestError for what cannot be said together."""
    fields = TemplateFields(**{name: getattr(body, name) for name in TemplateFields.__struct_fields__})
    if fields.continue_final_message and fields.add_generation_prompt:
        message = (
            "continue_final_message leaves the last message open, and add_generation_prompt begins another: "
            "send one of them"
        )
        raise RequestError("invalid_field", message, "add_generation_prompt")
    for name in fields.chat_template_kwargs or {}:
        if name in OWN_FIELDS - {"reasoning_effort"}:
            place = f"chat_template_kwargs.{name}"
            raise RequestError("invalid_field", f"{place}: send {name} as a field of the request itself", place)
    return fields


def conversation_of(
    messages: Sequence[Message],
    tools: Sequence[Tool],
    fields: TemplateFields,
    template: ChatTemplate,
    *,
    header: bool,
) -> Conversation:
    """What the template is given; `header` of the assistant's answer. Raises RequestError naming the field."""
    for index, turn in enumerate(messages):
        refuse_unbuilt(turn, f"messages[{index}].")
    plain = [_plain(message, f"messages[{index}]", template) for index, message in enumerate(messages)]
    if "tool_calls" not in template.text:
        plain = [calls_as_text(message, template.syntax) for message in plain]
    if "tools" not in template.text:
        plain, tools = with_description(plain, tools, template.syntax), ()
    if fields.documents and "documents" not in template.names:
        message = "documents: the chat template does not use them; put their text into a message"
        raise RequestError("unsupported_parameter", message, "documents")
    variables: dict[str, Any] = {}
    if fields.reasoning_effort is not None and "reasoning_effort" in template.names:
        variables["reasoning_effort"] = fields.reasoning_effort
    elif fields.reasoning_effort == "none" and "enable_thinking" in template.names:
        variables["enable_thinking"] = False
    return Conversation(
        messages=plain,
        tools=[as_json(tool) for tool in tools],
        documents=fields.documents or (),
        variables={**variables, **(fields.chat_template_kwargs or {})},
        header=header and fields.add_generation_prompt is not False and not fields.continue_final_message,
        continued=bool(fields.continue_final_message),
    )


def text_of(message: Message) -> str | None:
    """A message's content, or why the assistant refused, as one string; None if it has neither."""
    content = message.refusal if message.content is None else message.content
    if content is None or isinstance(content, str):
        return content
    return "\n".join(part.refusal if isinstance(part, RefusalPart) else part.text for part in content)


def echo_of(body: ChatRequest) -> str:
    """What `echo` puts before the answer, as in vLLM: the last message, if the answer has its role.

    An answer that begins no message of its own has the role of the last one.
    """
    last = body.messages[-1]
    begins = body.add_generation_prompt is not False and not body.continue_final_message
    return "" if begins and last.role != "assistant" else text_of(last) or ""


def _plain(message: Message, place: str, template: ChatTemplate) -> dict[str, Any]:
    """A message as chat templates know it: content is one string, a call's arguments a mapping. Raises RequestError."""
    content = text_of(message)
    if content is None and not message.tool_calls:
        raise RequestError("missing_field", f"{place}.content is required without tool_calls", f"{place}.content")
    role = message.role
    if role == "developer" and "developer" not in template.text:
        role = "system"
    plain: dict[str, Any] = {"role": role, "content": content or ""}
    thoughts = message.reasoning if message.reasoning_content is None else message.reasoning_content
    if thoughts is not None:
        plain["reasoning_content"] = thoughts
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        calls = enumerate(message.tool_calls)
        plain["tool_calls"] = [_plain_call(call, f"{place}.tool_calls[{index}]") for index, call in calls]
    return plain


def _plain_call(call: ToolCall, place: str) -> dict[str, Any]:
    field = f"{place}.function.arguments"
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise RequestError("invalid_field", f"{field} must be a JSON object as text: {error}", field) from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
