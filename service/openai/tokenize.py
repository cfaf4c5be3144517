"""POST /tokenize and /detokenize, as vLLM has them: a prompt's or a conversation's token ids, and back."""

from starlette.requests import Request
from starlette.responses import Response

from service.errors import RequestError
from service.http import json_response, read_json
from service.openai.models import find_version
from service.openai.sampling_params import check_token_ids
from service.openai.schemas import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from service.services import Services, services_of


async def tokenize(request: Request) -> Response:
    services = services_of(request)
    body = await read_json(request, TokenizeRequest, services.settings.max_body_bytes)
    _check_model(body.model, services)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError(
            "invalid_field", "expected either prompt or messages", "messages" if body.prompt else "prompt"
        )
    if body.messages is not None:
        header = body.add_generation_prompt is not False
        token_ids = await services.prompts.encode_chat(body.messages, body.tools or (), generation_prompt=header)
    else:
        assert body.prompt is not None
        special = body.add_special_tokens is not False
        [token_ids] = await services.tokenizer.encode_texts([body.prompt], add_special_tokens=special)
    names = [services.tokenizer.token_bytes(i).decode(errors="replace") for i in token_ids]
    return json_response(
        Tokenized(
            count=len(token_ids),
            max_model_len=services.max_model_len,
            tokens=token_ids,
            token_strs=names if body.return_token_strs else None,
        )
    )


async def detokenize(request: Request) -> Response:
    services = services_of(request)
    body = await read_json(request, DetokenizeRequest, services.settings.max_body_bytes)
    _check_model(body.model, services)
    check_token_ids(body.tokens, services.vocab_size, "tokens")
    return json_response(Detokenized(prompt=services.tokenizer.shown(body.tokens)))


def _check_model(name: str | None, services: Services) -> None:
    """Adapters share the base's tokenizer; a name that nobody knows is refused all the same."""
    if name is not None:
        find_version(name, services.settings.served_name, services.catalog.versions, "model")
