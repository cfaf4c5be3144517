"""What clients may call a model: the base, an adapter by name, by name and digest, or after the base's name."""

import re

from starlette.requests import Request
from starlette.responses import Response

from service.catalog.record import AdapterVersion
from service.catalog.versions import Versions
from service.errors import RequestError
from service.http import json_response
from service.openai.schemas import GenerationRequest, ModelCard, ModelList
from service.services import services_of

DIGEST = re.compile(r"[0-9a-f]{8,64}")


def resolve(request: GenerationRequest, base: str, versions: Versions) -> AdapterVersion | None:
    """The adapter that a request asks for, None for the base. Raises RequestError, also if it asks for two."""
    asked = {field: name for field in ("lora_path", "adapter_id") if (name := getattr(request, field)) is not None}
    version = find_version(request.model, base, versions, "model")
    for field, name in asked.items():
        other = find_version(name, base, versions, field)
        if version is not None and other is not version:
            message = f"model {request.model!r} and {field} {name!r} are different adapters: name one"
            raise RequestError("conflicting_adapters", message, field)
        version = other
    return version


def find_version(name: str, base: str, versions: Versions, param: str) -> AdapterVersion | None:
    """The adapter that goes by a name, None for the base. Raises RequestError.

    A name may itself look like name@digest or base:adapter, so a name as it stands comes first.
    """
    if name == base:
        return None
    own = name.removeprefix(f"{base}:")
    if (version := versions.resolve(name) or versions.resolve(own)) is not None:
        return version
    wanted, _, digest = own.rpartition("@")
    version = versions.resolve(wanted)
    if version is None:
        raise RequestError("model_not_found", f"there is no model or adapter {name!r}", param)
    if not (DIGEST.fullmatch(digest) and version.digest.startswith(digest)):
        message = f"adapter {wanted!r} is now {version.digest}, not {digest!r} (give at least 8 of its hex digits)"
        raise RequestError("model_not_found", message, param)
    return version


async def list_models(request: Request) -> Response:
    return json_response(ModelList(data=_cards(request)))


async def get_model(request: Request) -> Response:
    name = request.path_params["model"]
    for card in _cards(request):
        if card.id == name:
            return json_response(card)
    raise RequestError("model_not_found", f"there is no model or adapter {name!r}", "model")


def _cards(request: Request) -> list[ModelCard]:
    services = services_of(request)
    base = services.settings.served_name

    def card(name: str, created: float, parent: str | None) -> ModelCard:
        return ModelCard(
            id=name,
            created=int(created),
            owned_by="rootstock",
            root=name,
            parent=parent,
            max_model_len=services.max_model_len,
        )

    named = services.catalog.versions.list()
    return [
        card(base, services.started_at, None),
        *(card(version.name, version.record.created_at, base) for version in named),
    ]
