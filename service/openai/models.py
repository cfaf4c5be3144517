"""What clients may call a model: the base, an adapter by name, by name and digest, or after the base's name."""

import re

from starlette.requests import Request
from starlette.responses import Response

from service.catalog.catalog import Catalog
from service.catalog.record import AdapterVersion
from service.openai.schemas import GenerationRequest, ModelCard, ModelList
from service.responses import ApiError, json_response

DIGEST = re.compile(r"[0-9a-f]{8,64}")


def resolve(request: GenerationRequest, base: str, catalog: Catalog) -> AdapterVersion | None:
    """The adapter that a request asks for, None for the base. Raises ApiError 404, or 400 if it asks for two."""
    asked = {field: name for field in ("lora_path", "adapter_id") if (name := getattr(request, field)) is not None}
    version = find_version(request.model, base, catalog, "model")
    for field, name in asked.items():
        other = find_version(name, base, catalog, field)
        if version is not None and other is not version:
            message = f"model {request.model!r} and {field} {name!r} are different adapters: name one"
            raise ApiError(400, "conflicting_adapters", message, field)
        version = other
    return version


def find_version(name: str, base: str, catalog: Catalog, param: str) -> AdapterVersion | None:
    """The adapter that goes by a name, None for the base. Raises ApiError 404."""
    if name == base:
        return None
    wanted, _, digest = name.removeprefix(f"{base}:").partition("@")
    version = catalog.resolve(wanted)
    if version is None:
        raise ApiError(404, "model_not_found", f"there is no model or adapter {name!r}", param)
    if "@" in name and not (DIGEST.fullmatch(digest) and version.digest.startswith(digest)):
        message = f"adapter {wanted!r} is now {version.digest}, not {digest!r} (give at least 8 of its hex digits)"
        raise ApiError(404, "model_not_found", message, param)
    return version


async def list_models(request: Request) -> Response:
    return json_response(ModelList(data=_cards(request)))


async def get_model(request: Request) -> Response:
    name = request.path_params["model"]
    for card in _cards(request):
        if card.id == name:
            return json_response(card)
    raise ApiError(404, "model_not_found", f"there is no model or adapter {name!r}", "model")


def _cards(request: Request) -> list[ModelCard]:
    state = request.app.state
    base = state.settings.served_name

    def card(name: str, created: float, parent: str | None) -> ModelCard:
        return ModelCard(
            id=name,
            created=int(created),
            owned_by="rootstock",
            root=name,
            parent=parent,
            max_model_len=state.max_model_len,
        )

    adapters = (card(version.name, version.record.created_at, base) for version in state.catalog.list())
    return [card(base, state.started_at, None), *adapters]
