"""POST /v1/chat/completions."""

import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from service.errors import RequestError
from service.grammars.grammars import ThoughtTokens, after_thoughts
from service.grammars.source import Source
from service.http import read_body
from service.openai.conversations import echo_of, template_fields, text_of
from service.openai.echo import EchoedPrompt
from service.openai.forms import grammar_of, source_of
from service.openai.generation import Delta
from service.openai.known_fields import decode_request
from service.openai.models import Adapters
from service.openai.prompts import encoding_of
from service.openai.sampling_params import answer_length, sampling_params
from service.openai.schemas import (
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    CompletionTokensDetails,
    FinishReason,
    FunctionDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from service.openai.streaming import Inputs, answer
from service.openai.tool_choice import calls_schema, check_tools, forced_tools, usable_tools
from service.services import Services, services_of
from service.text.chat_templates import ChatTemplate
from service.text.reasoning import BEGIN, END, TAIL, ReasoningFamily, ReasoningSplitter, splitter_after
from service.tool_calls.parser import Arguments, Begun, Text, ToolCallParser


async def chat_completions(request: Request) -> Response:
    arrived, services = time.perf_counter(), services_of(request)
    body = decode_request(await read_body(request, services.bodies), ChatRequest)
    return await answer(request, services, Chat(services, body), arrived)


class Turn:
    """One choice's message: its thoughts, its text, and its calls as they come."""

    def __init__(
        self, splitter: ReasoningSplitter | None, parser: ToolCallParser | None, *, several: bool, short_ids: bool
    ) -> None:
        self.content = self.reasoning = ""
        self.thought = ""  # what the last delta added to the reasoning
        self.reasoning_tokens = 0  # with those of the tags
        self.told = False  # whether the client has had a chunk of it
        self._splitter, self._parser, self._several, self._short_ids = splitter, parser, several, short_ids
        self._undecided = 0  # tokens that came before it was known whether they are thoughts
        self._names: list[str] = []
        self._arguments: list[str] = []
        self._ids: list[str] = []

    @property
    def calls(self) -> list[ToolCall]:
        each = list(zip(self._ids, self._names, self._arguments, strict=True))[: None if self._several else 1]
        return [ToolCall(id=id, function=CalledFunction(name=name, arguments=text)) for id, name, text in each]

    def push(self, delta: Delta) -> list[str | ToolCallDelta]:
        """The content and the calls that the message gains, in their order."""
        text = self._after_thoughts(delta)
        if self._parser is None:
            self.content += text
            return [text] if text else []
        pieces = self._parser.push(text)
        if delta.finish_reason is not None:
            pieces += self._parser.flush()
        gained: list[str | ToolCallDelta] = []
        for piece in pieces:
            match piece:
                case Text(text=text):
                    self.content += text
                    gained.append(text)
                case Begun(name=name):
                    gained += self._begin(name)
                case Arguments(text=text):
                    gained += self._continue(text)
        return gained

    def finish_reason(self, delta: Delta) -> FinishReason | None:
        return "tool_calls" if self._names and delta.finish_reason == "stop" else delta.finish_reason

    def _after_thoughts(self, delta: Delta) -> str:
        """The text of a delta that is no thought."""
        if self._splitter is None:
            return delta.text
        if not self._splitter.answering:
            self._undecided += len(delta.token_ids)
        self.thought, text = self._splitter.push(delta.text)
        if delta.finish_reason is not None:
            rest = self._splitter.flush()
            self.thought, text = self.thought + rest.reasoning, text + rest.content
        self.reasoning += self.thought
        if self._splitter.has_thoughts:
            self.reasoning_tokens, self._undecided = self.reasoning_tokens + self._undecided, 0
        return text

    def _begin(self, name: str) -> list[ToolCallDelta]:
        self._names.append(name)
        self._arguments.append("")
        self._ids.append(uuid4().hex[:9] if self._short_ids else f"call_{uuid4().hex[:24]}")
        if self._ignored:
            return []
        function = FunctionDelta(name=name, arguments="")
        return [ToolCallDelta(index=len(self._ids) - 1, function=function, id=self._ids[-1], type="function")]

    def _continue(self, text: str) -> list[ToolCallDelta]:
        self._arguments[-1] += text
        if self._ignored:
            return []
        return [ToolCallDelta(index=len(self._ids) - 1, function=FunctionDelta(arguments=text))]

    @property
    def _ignored(self) -> bool:
        """Whether the last call is one too many."""
        return not self._several and len(self._ids) > 1


def _merged(deltas: list[ToolCallDelta]) -> list[ToolCallDelta]:
    """One delta for each call: clients take two of one index in a chunk for two calls."""
    merged: list[ToolCallDelta] = []
    for delta in deltas:
        if merged and merged[-1].index == delta.index:
            function = merged[-1].function
            both = msgspec.structs.replace(function, arguments=function.arguments + delta.function.arguments)
            merged[-1] = msgspec.structs.replace(merged[-1], function=both)
        else:
            merged.append(delta)
    return merged


class Chat:
    """One chat request: reads its fields, and formats its answer as OpenAI's API does."""

    built: Sequence[str] = ("echo", "prompt_logprobs", "return_token_ids")

    def __init__(self, services: Services, body: ChatRequest, id: str | None = None):
        self.id, self.body = id or f"chatcmpl-{uuid4().hex}", body
        self._services, self._tokenizer = services, services.tokenizer
        self._created = int(time.time())
        self._turns: dict[int, Turn] = {}  # by choice
        self._template: ChatTemplate  # known once the inputs are
        self._prompt: EchoedPrompt
        self._reasoning: ReasoningFamily = "none"
        self._prompt_end = ""
        self._echo = echo_of(body) if body.echo else ""

    async def inputs(self, adapters: Adapters) -> Inputs:
        body, services = self.body, self._services
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError("invalid_field", "top_logprobs needs logprobs to be true", "top_logprobs")
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            message = f"max_tokens ({body.max_tokens}) and max_completion_tokens ({body.max_completion_tokens}) differ"
            raise RequestError("invalid_field", message, "max_completion_tokens")
        if body.stream and body.prompt_logprobs is not None:
            message = "prompt_logprobs of a chat are not streamed: leave out stream or prompt_logprobs"
            raise RequestError("unsupported_parameter", message, "prompt_logprobs")
        check_tools(body)
        tools = usable_tools(body)
        [version] = adapters.of_prompts(1)
        fields = template_fields(body)
        self._template = template = await services.prompts.template(version, tools, fields)
        asked = body.max_completion_tokens or body.max_tokens
        encoding = encoding_of(body, asked)
        prompt = await services.prompts.chat_prompt(body.messages, version, body.alora, tools, fields, encoding)
        length_param = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        length = len(prompt.token_ids)
        max_tokens = answer_length(asked, None, length, services.max_model_len, "messages", length_param)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self._prompt = EchoedPrompt(prompt.token_ids, None, self._tokenizer)
        self._prompt_end = self._tokenizer.shown(prompt.token_ids[-TAIL:])
        self._reasoning = "none" if body.separate_reasoning is False else template.reasoning
        grammar = self._after_thoughts(await self._grammar())
        params = sampling_params(body, max_tokens, logprobs, services.vocab_size, grammar, self._tokenizer)
        params = msgspec.structs.replace(params, prompt_logprobs=body.prompt_logprobs)
        marks = [template.syntax.begin] if tools else []
        marks += [] if self._splitter() is None else [END]
        marked = any(map(self._tokenizer.is_special, marks))
        return Inputs([prompt], params, marked or body.skip_special_tokens is False)

    def _after_thoughts(self, grammar: str | None) -> str | None:
        """The grammar, from the end of the thoughts on; from the first token on if no tokens mark the thoughts."""
        splitter = self._splitter()
        if grammar is None or splitter is None:
            return grammar
        token_id, special = self._tokenizer.token_id, self._tokenizer.special_tokens
        begin, end = token_id(BEGIN), token_id(END)
        if begin is None or end is None:
            self._reasoning = "none"  # such an answer has no thoughts
            return grammar
        tokens = ThoughtTokens(begin, end, token_id(special.get("eos_token", "")))
        return after_thoughts(grammar, tokens, inside=splitter.inside)

    def _splitter(self) -> ReasoningSplitter | None:
        continued = text_of(self.body.messages[-1]) if self.body.continue_final_message else None
        return splitter_after(self._reasoning, self._prompt_end, continued or "")

    async def _grammar(self) -> str | None:
        """The grammar of the answer: of the calls that it must consist of, or of what a field asks for."""
        body, grammars = self.body, self._services.grammars
        forced = forced_tools(body)
        if not forced:
            return await grammar_of(body, grammars)
        if (other := source_of(body)) is not None:
            message = f"tool_choice and {other.field} each say what the answer must look like: send one of them"
            raise RequestError("invalid_field", message, other.field)
        schema = calls_schema(forced, several=body.parallel_tool_calls is not False)
        return await grammars.translate(Source("tools", "json_schema", schema))

    def chunk(self, delta: Delta) -> msgspec.Struct | None:
        turn, tells_ids = self.turn(delta.choice), self.body.return_token_ids
        first = not any(turn.told for turn in self._turns.values())
        gained = turn.push(delta)
        content = "".join(each for each in gained if isinstance(each, str))
        calls = _merged([each for each in gained if isinstance(each, ToolCallDelta)])
        thought = (turn.thought if self.tells_thoughts else "") or None
        begins = not turn.told
        if begins:
            content = self._echo + content
        tokens = delta.generated if tells_ids else delta.logprobs
        if not (content or calls or thought or tokens or delta.logprobs or delta.finish_reason):
            return None
        turn.told = True
        choice = ChatChunkChoice(
            index=delta.choice,
            delta=ChatDelta(
                role="assistant" if begins else None,
                content=content if content or (begins and not calls) else None,
                tool_calls=calls or None,
                reasoning_content=thought,
                reasoning=thought,
            ),
            logprobs=self.logprobs([delta]),
            finish_reason=turn.finish_reason(delta),
            token_ids=delta.generated if tells_ids else msgspec.UNSET,
        )
        return self._chunk([choice], prompt=list(self._prompt.token_ids) if tells_ids and first else None)

    def turn(self, choice: int) -> Turn:
        if choice not in self._turns:
            body, parser = self.body, None
            if usable_tools(body):
                parser = ToolCallParser(self._template.syntax, inside=bool(forced_tools(body)))
            several = body.parallel_tool_calls is not False
            self._turns[choice] = Turn(self._splitter(), parser, several=several, short_ids=self._short_ids)
        return self._turns[choice]

    @property
    def _short_ids(self) -> bool:
        return self._template.family == "mistral"  # its chat template takes ids of 9 characters only

    @property
    def tells_thoughts(self) -> bool:
        return self.body.include_reasoning is not False

    @property
    def reasoning_tokens(self) -> int:
        """Of all choices, as far as they have come."""
        return sum(turn.reasoning_tokens for turn in self._turns.values())

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        return self._chunk([], self._with_details(usage))

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: Usage | None = None, prompt: list[int] | None = None
    ) -> ChatChunk:
        return ChatChunk(
            id=self.id,
            created=self._created,
            model=self.body.model,
            choices=choices,
            usage=usage,
            prompt_token_ids=prompt,
        )

    def whole(self, choices: list[list[Delta]], usage: Usage) -> msgspec.Struct:
        body, prompt = self.body, self._prompt
        prompt.scores = choices[0][0].prompt_logprobs or []
        return ChatCompletion(
            id=self.id,
            created=self._created,
            model=body.model,
            choices=[self._choice(deltas) for deltas in choices],
            usage=self._with_details(usage),
            prompt_logprobs=msgspec.UNSET if body.prompt_logprobs is None else prompt.logprobs(body.prompt_logprobs),
            prompt_token_ids=list(prompt.token_ids) if body.return_token_ids else msgspec.UNSET,
        )

    def _with_details(self, usage: Usage) -> Usage:
        details = CompletionTokensDetails(reasoning_tokens=self.reasoning_tokens)
        return msgspec.structs.replace(usage, completion_tokens_details=details)

    def _choice(self, deltas: Sequence[Delta]) -> ChatChoice:
        turn = self.turn(deltas[0].choice)
        for delta in deltas:
            turn.push(delta)
        reason = turn.finish_reason(deltas[-1])
        assert reason is not None
        thoughts = (turn.reasoning if self.tells_thoughts else "") or msgspec.UNSET
        content = self._echo + turn.content
        return ChatChoice(
            index=deltas[0].choice,
            message=ChatMessage(
                role="assistant",
                content=content if content or not (turn.calls or turn.reasoning) else None,
                refusal=None,
                tool_calls=turn.calls or msgspec.UNSET,
                reasoning_content=thoughts,
                reasoning=thoughts,
            ),
            logprobs=self.logprobs(deltas),
            finish_reason=reason,
            token_ids=[each for delta in deltas for each in delta.generated]
            if self.body.return_token_ids
            else msgspec.UNSET,
        )

    def logprobs(self, deltas: Sequence[Delta]) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        content = []
        for delta in deltas:
            for token_id, entry in zip(delta.token_ids, delta.logprobs or (), strict=False):
                top = dict(zip(entry.top_ids, entry.top_logprobs, strict=True))
                if top:
                    top.setdefault(token_id, entry.logprob)
                content.append(
                    TokenLogprob(
                        **self._named(token_id),
                        logprob=entry.logprob,
                        top_logprobs=[TopLogprob(**self._named(i), logprob=logprob) for i, logprob in top.items()],
                    )
                )
        return ChatLogprobs(content=content, refusal=None)

    def _named(self, token_id: int) -> dict[str, Any]:
        """A token's text and its own bytes, which tell tokens apart that are parts of characters."""
        own = self._tokenizer.token_bytes(token_id)
        as_id = self.body.return_tokens_as_token_ids
        return {"token": f"token_id:{token_id}" if as_id else own.decode(errors="replace"), "bytes": list(own)}
