"""Prompts of requests, as text, token ids or messages, encoded to token ids for their model."""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from service.catalog.record import AdapterVersion, OnMissing
from service.errors import RequestError
from service.openai.conversations import conversation_of, text_of
from service.openai.invocation import Prompt, invoked, on_missing, without_invocation
from service.openai.sampling_params import answer_length, check_token_ids
from service.openai.schemas import (
    MAX_SEQUENCES,
    Alora,
    GenerationRequest,
    Message,
    TemplateFields,
    TokenizeRequest,
    Tool,
)
from service.text.chat_templates import ChatTemplate, ChatTemplates
from service.text.encoder import TooLong
from service.text.rendering import InvalidChat, InvalidTemplate
from service.text.tokenizer import Tokenizer

NO_FIELDS = TemplateFields()


class Encoding(NamedTuple):
    """How prompts become tokens."""

    special: bool | None = None  # whether special tokens are put around a text; None: around prompts, not around chats
    most: int | None = None  # the last so many tokens stay; -1: as many as leave room for the answer
    answer: int | None = None  # tokens of the answer that are asked for
    contexts: int = 1  # how many contexts a text may fill: more than one where it is not generated from


PLAIN = Encoding()


def encoding_of(body: GenerationRequest | TokenizeRequest, answer: int | None = None, contexts: int = 1) -> Encoding:
    """What a request says of it. Raises RequestError."""
    if body.truncate_prompt_tokens == 0:
        message = "truncate_prompt_tokens is 0, expected how many tokens stay, or -1 for as many as fit"
        raise RequestError("invalid_field", message, "truncate_prompt_tokens")
    return Encoding(body.add_special_tokens, body.truncate_prompt_tokens, answer, contexts)


class PromptEncoder:
    """Encodes prompts and finds in each where its adapter begins to apply. All methods raise RequestError."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        templates: ChatTemplates,
        vocab_size: int,
        max_model_len: int,
        on_missing: OnMissing = "error",
        *,
        request_templates: bool = False,
    ) -> None:
        self._tokenizer, self._templates = tokenizer, templates
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len  # tokens of prompt and answer together
        self._on_missing = on_missing  # an aLoRA's invocation, if neither request nor adapter says what then
        self._request_templates = request_templates  # whether requests may bring one

    async def text_prompts(
        self,
        prompt: str | list[str | int | list[int]],
        versions: Sequence[AdapterVersion | None],
        alora: Alora | None,
        encoding: Encoding = PLAIN,
    ) -> list[Prompt]:
        """The prompts of a completion, each with its own invocation; there is a version for each."""
        if (number := number_of(prompt)) > MAX_SEQUENCES:
            raise RequestError("too_many_sequences", f"{number} prompts are more than {MAX_SEQUENCES}", "prompt")
        prompts = [self._cut(token_ids, encoding) for token_ids in await self._encode_prompts(prompt, encoding)]
        least = 0 if encoding.answer == 0 else None
        answer_length(least, None, max(map(len, prompts)), self._max_model_len, "prompt")  # before they are searched
        encoded = []
        for token_ids, version, found in zip(prompts, versions, await invoked(prompts, versions), strict=True):
            if found is None:
                assert version is not None
                found = without_invocation(token_ids, version, self._wanted(alora, version), self._tokenizer, "prompt")
            encoded.append(found)
        return encoded

    async def chat_prompt(
        self,
        messages: Sequence[Message],
        version: AdapterVersion | None,
        alora: Alora | None,
        tools: Sequence[Tool] = (),
        fields: TemplateFields = NO_FIELDS,
        encoding: Encoding = PLAIN,
    ) -> Prompt:
        """A conversation up to where the assistant's answer begins.

        An invocation that is to be appended replaces the generation prompt (the assistant's header).
        """
        token_ids = await self.encode_chat(messages, version, tools, fields, encoding)
        [prompt] = await invoked([token_ids], [version])
        if prompt is not None:
            return prompt
        assert version is not None
        wanted = self._wanted(alora, version)
        if wanted == "append":
            token_ids = await self.encode_chat(messages, version, tools, fields, encoding, header=False)
        return without_invocation(token_ids, version, wanted, self._tokenizer, "messages")

    async def chat_prefix(
        self, messages: Sequence[Message], version: AdapterVersion | None, alora: Alora | None
    ) -> Prompt:
        """The tokens that every later request with these first messages begins with."""
        whole = await self.encode_chat(messages, version, header=False)
        answered = await self.encode_chat(messages, version)
        # A template may end a conversation with tokens that are absent when it goes on, and so may the tokenizer
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(whole, answered, strict=False))
        shared = _some([token_id for token_id, _ in pairs])
        found, later = await invoked([shared, answered], [version, version])
        if later is not None and (found is None or found.invocation_start < later.invocation_start):
            # The generation prompt itself contains the invocation, so every token before it uses the base model
            assert version is not None
            if self._wanted(alora, version) == "append":
                return later
            return later._replace(token_ids=shared, invocation_start=min(later.invocation_start, len(shared)))
        if found is not None:
            return found
        assert version is not None
        wanted = self._wanted(alora, version)
        base = whole if wanted == "append" else shared
        return without_invocation(base, version, wanted, self._tokenizer, "messages")

    def _wanted(self, alora: Alora | None, version: AdapterVersion) -> OnMissing:
        return on_missing(alora, version, self._on_missing)

    async def encode_chat(
        self,
        messages: Sequence[Message],
        version: AdapterVersion | None,
        tools: Sequence[Tool] = (),
        fields: TemplateFields = NO_FIELDS,
        encoding: Encoding = PLAIN,
        *,
        header: bool = True,
    ) -> list[int]:
        """A conversation's token ids, with the header of the assistant's answer, unless `fields` want none, or not."""
        if len(messages) > self._max_model_len:  # each has a token at least
            raise self._too_long(f"{len(messages)} messages", "messages")
        length = sum(len(text_of(message) or "") for message in messages)
        if encoding.most is None and length > self._tokenizer.longest_token * self._max_model_len:
            raise self._too_long(f"{length} characters", "messages")
        template = await self.template(version, tools, fields)
        conversation = conversation_of(messages, tools, fields, template, header=header)
        try:
            text = await self._templates.render(template, conversation)
        except InvalidChat as error:
            raise RequestError("invalid_chat", str(error), "messages") from None
        [token_ids] = await self._encode_texts([text], encoding, encoding.special is True, "messages")
        check_token_ids(_some(token_ids), self._vocab_size, "messages")
        return self._cut(token_ids, encoding)

    def _cut(self, token_ids: list[int], encoding: Encoding) -> list[int]:
        """The last tokens of a prompt, if it is to be truncated."""
        if encoding.most is None:
            return token_ids
        room = self._max_model_len - (1 if encoding.answer is None else encoding.answer)
        return token_ids[-(encoding.most if encoding.most > 0 else max(room, 1)) :]

    async def _encode_texts(
        self, texts: Sequence[str], encoding: Encoding, special: bool, param: str
    ) -> list[list[int]]:
        """The tokens of texts that fit into the context or are to be cut so. Raises RequestError for a longer one."""
        most = self._max_model_len * encoding.contexts
        last = encoding.most is not None and encoding.most <= most
        try:
            return await self._tokenizer.encode_texts(texts, add_special_tokens=special, most=most, last=last)
        except TooLong as error:
            raise self._too_long(f"at least {error}", param) from None

    def _too_long(self, found: str, param: str) -> RequestError:
        """OpenAI's sentence: clients look for its beginning, and then shorten the prompt."""
        message = (
            f"This model's maximum context length is {self._max_model_len} tokens. However, the prompt has {found}. "
            f"Please reduce the length of the {param}."
        )
        return RequestError("context_length_exceeded", message, param)

    async def encode_text(self, text: str, encoding: Encoding) -> list[int]:
        """A text's token ids; none for an empty one."""
        [token_ids] = await self._encode_texts([text], encoding, encoding.special is not False, "prompt")
        return self._cut(token_ids, encoding)

    async def template(
        self, version: AdapterVersion | None, tools: Sequence[Tool] = (), fields: TemplateFields = NO_FIELDS
    ) -> ChatTemplate:
        """The template of a request: its own, else its adapter's, else the server's."""
        param = "messages" if fields.chat_template is None else "chat_template"
        if fields.chat_template is not None and not self._request_templates:
            message = (
                "chat_template: this server takes no templates from requests; leave it out, "
                "or start the server with --allow-request-chat-template"
            )
            raise RequestError("unsupported_parameter", message, param)
        text = fields.chat_template or (None if version is None else version.record.chat_template)
        try:
            template = await self._templates.of(text, tools=bool(tools))
        except InvalidTemplate as error:
            raise RequestError("invalid_chat", f"the chat template does not parse: {error}", param) from None
        if template is None:
            message = (
                "the model has no chat template: use /v1/completions, or start the server with --chat-template, "
                "or upload the adapter with a chat_template.jinja"
            )
            raise RequestError("invalid_chat", message, param)
        return template

    async def _encode_prompts(self, prompt: str | list[str | int | list[int]], encoding: Encoding) -> list[list[int]]:
        """The token ids of a prompt in any of its four forms."""
        texts = [prompt] if isinstance(prompt, str) else [item for item in prompt if isinstance(item, str)]
        if isinstance(prompt, str) or (texts and len(texts) == len(prompt)):
            prompts = await self._encode_texts(texts, encoding, encoding.special is not False, "prompt")
        elif all(isinstance(item, int) for item in prompt):
            prompts = [[item for item in prompt if isinstance(item, int)]]
        elif all(isinstance(item, list) for item in prompt):
            prompts = [item for item in prompt if isinstance(item, list)]
        else:
            message = "prompt: strings, token ids and lists of them cannot be mixed"
            raise RequestError("invalid_field", message, "prompt")
        if not prompts or not all(prompts):
            raise RequestError("empty_prompt", "prompt: a prompt needs at least one token", "prompt")
        for token_ids in prompts:
            check_token_ids(token_ids, self._vocab_size, "prompt")
        return prompts


def number_of(prompt: str | list[str | int | list[int]]) -> int:
    """How many prompts a field holds: a list of token ids is one."""
    return 1 if isinstance(prompt, str) or all(isinstance(item, int) for item in prompt) else len(prompt)


def _some(token_ids: list[int]) -> list[int]:
    if not token_ids:
        raise RequestError("empty_prompt", "messages: the chat template makes no tokens of them", "messages")
    return token_ids
