"""The bodies of OpenAI's Responses API: what clients send, what they get, and the events of a stream.

Unknown fields of a request are ignored and null means the default, as in chats.
"""

from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from service.openai.schemas import (
    FunctionName,
    GenerationRequest,
    JsonObject,
    Logprobs,
    Name,
    Positive,
    TemplateText,
    TextFormat,
    TokenLogprob,
)

LOGPROBS = "message.output_text.logprobs"
ItemStatus = Literal["in_progress", "completed", "incomplete"]


# What clients send as input. An item without a type is a message.


class SentText(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="input_text"):
    text: str


class SentPlainText(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    text: str


class SentOutputText(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="output_text"):
    text: str


class SentRefusal(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="refusal"):
    refusal: str


class SentMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[SentText | SentPlainText | SentOutputText | SentRefusal]
    id: str | None = None


class SentCall(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    call_id: Name
    name: Name
    arguments: str  # a JSON object as text
    id: str | None = None


class SentCallOutput(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call_output"):
    call_id: Name
    output: str | list[SentText | SentPlainText]
    id: str | None = None


class SummaryText(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="summary_text"):
    text: str


class ReasoningText(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning_text"):
    text: str


class SentReasoning(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    """Thoughts of an earlier answer. What another server has encrypted is not shown to the model."""

    id: str | None = None
    summary: list[SummaryText] | None = None
    content: list[ReasoningText] | None = None


class SentReference(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="item_reference"):
    """Refused by name."""

    id: str


SentItem = SentMessage | SentCall | SentCallOutput | SentReasoning | SentReference


class SentItems(msgspec.Struct, frozen=True, kw_only=True):
    input: list[SentItem]


# What a request asks for


class SchemaFormat(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="json_schema"):
    name: str
    schema: dict[str, Any] | bool
    description: str | None = None
    strict: bool | None = None  # the answer follows the schema either way


class TextOptions(msgspec.Struct, frozen=True, kw_only=True):
    format: TextFormat | JsonObject | SchemaFormat | None = None
    verbosity: Any = None


class Reasoning(msgspec.Struct, frozen=True, kw_only=True):
    effort: str | None = None  # for templates that know it
    # Thoughts are told whole, so that none are summed up; the older field is another name
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class FunctionTool(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON Schema; none: the function takes no arguments
    strict: bool | None = None  # arguments follow the schema wherever a call is forced


class NamedFunction(msgspec.Struct, frozen=True, kw_only=True):
    """The function that the answer must call."""

    type: Literal["function"]
    name: str


ToolChoice = Literal["none", "auto", "required"] | NamedFunction
MetadataKey = Annotated[str, Meta(max_length=64)]
MetadataValue = Annotated[str, Meta(max_length=512)]


class ResponsesRequest(GenerationRequest, frozen=True, kw_only=True):
    """OpenAI's fields, and of a chat's those that shape the sampling, the adapter and the form of the answer."""

    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1)]  # each a SentItem
    instructions: str | None = None  # not carried over to responses that follow
    previous_response_id: str | None = None
    max_output_tokens: Positive | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: ToolChoice | None = None  # None: auto if there are tools
    parallel_tool_calls: bool | None = None  # whether there may be several calls; None: there may
    # Thoughts are not encrypted: their text is in the reasoning items
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: Logprobs | None = None
    store: bool | None = None  # None: it is stored
    metadata: Annotated[dict[MetadataKey, MetadataValue], Meta(max_length=16)] | None = None
    user: str | None = None
    truncation: Literal["auto", "disabled"] | None = None
    reasoning: Reasoning | None = None
    chat_template: TemplateText | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    include_reasoning: bool | None = None  # false: the thoughts are left out
    separate_reasoning: bool | None = None  # false: the thoughts stay in the text
    lora_path: Name | None = None
    adapter_id: Name | None = None
    # Without an effect here: they limit tools that are not built, and caches that keep more
    max_tool_calls: Any = None
    prompt_cache_options: Any = None
    # Refused by name unless they ask for nothing: see UNBUILT
    background: Any = None
    background_options: Any = None
    conversation: Any = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None
    access_programs: Any = None
    image: Any = None
    messages: Any = None
    logprobs: Any = None
    max_completion_tokens: Any = None
    functions: Any = None
    function_call: Any = None
    echo: Any = None
    prompt_logprobs: Any = None
    reasoning_effort: Any = None
    add_generation_prompt: Any = None
    continue_final_message: Any = None
    return_token_ids: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None


# What clients get


class OutputText(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] = []  # none are made
    logprobs: list[TokenLogprob] = []  # empty unless they were to be included


class InputText(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="input_text"):
    text: str


class Refusal(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="refusal"):
    refusal: str


class MessageItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    id: str
    role: Literal["user", "assistant", "system", "developer"]
    status: ItemStatus
    content: list[InputText | OutputText | Refusal]


class ReasoningItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    id: str
    summary: list[SummaryText] = []  # empty but in a client's own items
    content: list[ReasoningText]
    status: ItemStatus


class CallItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str  # JSON text, as the model wrote it
    status: ItemStatus


class CallOutputItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call_output"):
    id: str
    call_id: str
    output: str
    status: ItemStatus


OutputItem = MessageItem | ReasoningItem | CallItem
Item = MessageItem | ReasoningItem | CallItem | CallOutputItem


class InputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    cached_tokens: int
    cache_write_tokens: int = 0  # writing to the prefix cache is not counted


class OutputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    reasoning_tokens: int  # of the thoughts, with the tags around them


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(msgspec.Struct, frozen=True, kw_only=True):
    code: Literal["server_error"]
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True, kw_only=True):
    reason: Literal["max_output_tokens"]


class ModelResponse(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="response"):
    id: str
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False] = False
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None = None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: Reasoning | None
    store: bool
    temperature: float
    text: TextOptions
    tool_choice: ToolChoice
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None


class DeletedResponse(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="response"):
    id: str
    deleted: Literal[True] = True


class ItemList(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="list"):
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseQuery(msgspec.Struct, frozen=True, kw_only=True):
    stream: bool = False


class ItemsQuery(msgspec.Struct, frozen=True, kw_only=True):
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None  # the id of the item before the first one


# The events of a stream


class ResponseEvent(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    sequence_number: int
    response: ModelResponse


class ItemEvent(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputItem


class PartEvent(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputText | ReasoningText


class ReasoningDelta(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["response.reasoning_text.delta"] = "response.reasoning_text.delta"
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int = 0
    delta: str


class ReasoningDone(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["response.reasoning_text.done"] = "response.reasoning_text.done"
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int = 0
    text: str


class TextDelta(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int = 0
    delta: str
    logprobs: list[TokenLogprob]


class TextDone(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["response.output_text.done"] = "response.output_text.done"
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int = 0
    text: str
    logprobs: list[TokenLogprob]


class ArgumentsDelta(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"
    sequence_number: int
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
    sequence_number: int
    item_id: str
    output_index: int
    name: str
    arguments: str


Event = (
    ResponseEvent
    | ItemEvent
    | PartEvent
    | ReasoningDelta
    | ReasoningDone
    | TextDelta
    | TextDone
    | ArgumentsDelta
    | ArgumentsDone
)
EVENTS = get_args(Event)
