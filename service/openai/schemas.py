"""The bodies of the OpenAI API: what clients send and what they get.

As in OpenAI's own API, unknown fields of a request are ignored and null means the default.
"""

from collections.abc import Collection
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from service.catalog.record import MAX_TEMPLATE_BYTES, OnMissing
from service.grammars.tags import StructuralTag

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024  # characters; every piece of text is searched for each stop string
MAX_LOGPROBS = 20
MAX_SEQUENCES = 1024  # prompts times choices of one request
MAX_WORDS = 512  # each is encoded in two forms

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(ge=0, le=1)]  # 0: the likeliest token only
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Repetition = Annotated[float, Meta(gt=0, le=10)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Choices = Annotated[int, Meta(ge=1, le=128)]
Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
StopText = Annotated[str, Meta(max_length=MAX_STOP_LENGTH)]  # an empty one stops nothing
Stops = Annotated[list[StopText], Meta(max_length=MAX_STOPS)]
Truncation = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Name = Annotated[str, Meta(min_length=1)]
Seconds = Annotated[float, Meta(gt=0, le=1e6)]
TemplateText = Annotated[str, Meta(min_length=1, max_length=MAX_TEMPLATE_BYTES)]
Mix = Annotated[dict[Name, float], Meta(max_length=8)]  # adapters by name, each with its weight


def asks_for_nothing(value: Any, harmless: Collection[Any]) -> bool:
    """Whether a value is null or one of those, as JSON has it: 0 is not false."""
    return value is None or any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in harmless
    )


class Alora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request to an aLoRA adapter wants where its prompt lacks the adapter's invocation.

    `base` runs the base model instead; `append` puts the invocation at the prompt's end, in a chat in place of the
    assistant's header.
    """

    on_missing: OnMissing | None = None  # None: as the adapter's default, else as the server's


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    include_usage: bool | None = None


class TextFormat(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    pass


class JsonObject(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class NamedSchema(msgspec.Struct, frozen=True, kw_only=True):
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None  # the answer follows the schema either way


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="json_schema"):
    json_schema: NamedSchema


ResponseFormat = TextFormat | JsonObject | JsonSchema | StructuralTag
AnySchema = dict[str, Any] | bool | str  # a string holds it as JSON
Choice = Annotated[str, Meta(min_length=1)]
ChoiceList = Annotated[list[Choice], Meta(min_length=1)]


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's: one of these says what the answer must look like."""

    json: AnySchema | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: ChoiceList | None = None
    grammar: str | None = None  # GBNF or Lark
    structural_tag: StructuralTag | str | None = None  # a string holds it as JSON
    # vLLM's options for its own engines, without an effect here
    disable_fallback: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What both calls have in common: the model, the sampling, the adapter."""

    model: Name
    max_tokens: Positive | None = None
    min_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Fraction | None = None
    repetition_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    n: Choices | None = None
    stop: StopText | Stops | None = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: list[Count] | None = None
    logit_bias: dict[str, Bias] | None = None  # by token id
    allowed_token_ids: list[Count] | None = None  # only these are generated
    bad_words: Annotated[list[StopString], Meta(max_length=MAX_WORDS)] | None = None  # never generated
    ignore_eos: bool | None = None
    # The last so many tokens of each prompt; -1: as many as leave room for the answer
    truncate_prompt_tokens: Truncation | None = None
    add_special_tokens: bool | None = None  # those around a prompt's text; None: of completions, not of chats
    skip_special_tokens: bool | None = None  # of the text; None: they are skipped
    spaces_between_special_tokens: bool | None = None  # false: none, as most tokenizers have it either way
    return_tokens_as_token_ids: bool | None = None  # log-probabilities name tokens token_id:7
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout: Seconds | None = None  # seconds that the request may take; at most the server's own limit
    cache_salt: str | None = None
    adapters: Mix | None = None
    alora: Alora | None = None
    # What the answer must look like: OpenAI's field, vLLM's, its older ones, and SGLang's
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: AnySchema | None = None
    guided_regex: str | None = None
    guided_choice: ChoiceList | None = None
    guided_grammar: str | None = None
    json_schema: AnySchema | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: StructuralTag | str | None = None
    # Known to others, and not built here: refused by name unless they ask for nothing
    guided_whitespace_pattern: Any = None
    use_beam_search: Any = None


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    max_tokens: Count | None = None  # 0: nothing is generated
    lora_path: Name | Annotated[list[Name | None], Meta(max_length=MAX_SEQUENCES)] | None = (
        None  # a list has one for each prompt, null for the base
    )
    adapter_id: Name | Annotated[list[Name | None], Meta(max_length=MAX_SEQUENCES)] | None = None
    logprobs: Logprobs | None = None
    echo: bool | None = None  # the prompt before the answer; with logprobs its tokens' too
    prompt_logprobs: Logprobs | None = None
    return_token_ids: bool | None = None  # the prompt's and the answer's
    best_of: Choices | None = None  # so many are generated for each prompt, and the n likeliest given out
    suffix: Any = None
    prompt_embeds: Any = None


class TextPart(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    text: str


class RefusalPart(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="refusal"):
    refusal: str


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    name: Name
    arguments: str  # JSON text, as the model wrote it


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class Message(msgspec.Struct, frozen=True, kw_only=True):
    role: Name
    content: str | list[TextPart | RefusalPart] | None = None  # none only beside tool calls and a refusal
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None  # what the assistant thought, for the chat template
    reasoning: str | None = None  # another name of it
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None  # of the call that a message of the role tool answers
    function_call: Any = None


FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.\-]{1,64}$")]


class Function(msgspec.Struct, frozen=True, kw_only=True):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON Schema; none: the function takes no arguments
    strict: bool | None = None  # arguments follow the schema wherever a call is forced


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["function"]
    function: Function


class ChosenFunction(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class FunctionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The function that the answer must call."""

    type: Literal["function"]
    function: ChosenFunction


class TemplateFields(msgspec.Struct, frozen=True, kw_only=True):
    """What a request may tell the chat template besides messages and tools; `ChatRequest` has the same fields."""

    chat_template: TemplateText | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None  # None: it is added, unless the last message is continued
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None  # for templates that know it


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    prompt_logprobs: Logprobs | None = None  # not in a stream
    echo: bool | None = None  # the last message before the answer, if it is of the answer's role
    return_token_ids: bool | None = None
    lora_path: Name | None = None
    adapter_id: Name | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    tools: list[Tool] | None = None
    # None: auto if there are tools
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None  # whether there may be several calls; None: there may
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    prediction: Any = None
    web_search_options: Any = None
    chat_template: TemplateText | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None  # false: the thoughts are left out
    separate_reasoning: bool | None = None  # false: the thoughts stay in the content


class TokenizeRequest(TemplateFields, frozen=True, kw_only=True):
    """A prompt or the messages of a chat; fields that clients of vLLM send."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None  # None: to a prompt, not to a chat
    truncate_prompt_tokens: Truncation | None = None
    return_token_strs: bool | None = None


# The values of the fields above that ask for nothing; None always does
HARMLESS: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "return_token_ids": (False,),  # of calls whose answers have no place for them
    "prompt_logprobs": (),
    "guided_whitespace_pattern": (),
    "echo": (False,),
    "suffix": ("",),
    "prompt_embeds": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
}

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    reasoning_tokens: int  # of the thoughts, with the tags around them


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET  # of chats


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    text_offset: list[int]
    token_logprobs: list[float | None]  # none of a prompt's first token
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(msgspec.Struct, frozen=True, kw_only=True):
    logprob: float
    rank: int  # 1 for the likeliest
    decoded_token: str


# For each token of a prompt those of it and of the likeliest, by token id; null for the first
PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET  # in the first chunk of a stream
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Completion(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="object", tag="text_completion"
):
    """A completion, or one chunk of a streamed one (`usage` is then on the last only)."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]  # the token's own


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    content: list[TokenLogprob]
    refusal: None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET  # what a reasoning model thought before it answered
    reasoning: str | msgspec.UnsetType = msgspec.UNSET  # the same, as newer clients call it


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="chat.completion"):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list["ToolCallDelta"] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class FunctionDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    arguments: str
    name: str | None = None


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The beginning of a call, or more of its arguments."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: Literal["function"] | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="object", tag="chat.completion.chunk"
):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None  # in the first chunk
