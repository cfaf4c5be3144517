"""What clients may call a model: the base, an adapter by name, by name and digest, or after the base's name."""

import math
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from service.catalog.mixes import Mixes, Weighted
from service.catalog.record import AdapterVersion
from service.catalog.seen import GENERATION_HEADER, Seen, least_generation
from service.errors import RequestError
from service.http import json_response
from service.keys.caller import caller_of
from service.metrics import MIX, SEVERAL
from service.openai.schemas import GenerationRequest
from service.services import services_of

DIGEST = re.compile(r"[0-9a-f]{8,64}")
FIELDS = ("lora_path", "adapter_id")  # two names for one thing
SHOWN_PROMPTS, SHOWN_DIGITS = 64, 16  # of a request whose prompts have different adapters; proxies bound headers


class ModelCard(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="model"):
    id: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True, tag_field="object", tag="list"):
    data: list[ModelCard]


class Adapters(NamedTuple):
    """What the prompts of a request run on; None is the base."""

    versions: tuple[AdapterVersion | None, ...]  # one for all prompts, or one for each
    field: str | None = None  # the field that names one for each
    mixed: bool = False  # the one is a mix

    def of_prompts(self, count: int) -> Sequence[AdapterVersion | None]:
        """The adapter of each prompt. Raises RequestError if the field has another number of them."""
        if self.field is None:
            return self.versions * count
        if len(self.versions) != count:
            message = (
                f"{self.field} names {len(self.versions)} adapters and there are {count} prompts: name one for each "
                "prompt (null for the base), or one for all without a list"
            )
            raise RequestError("invalid_field", message, self.field)
        return self.versions

    @property
    def label(self) -> str | None:
        """The series of metrics that the request counts in; None is the base's."""
        names = {None if version is None else version.name for version in self.versions}
        return MIX if self.mixed else SEVERAL if len(names) > 1 else names.pop()

    @property
    def digests(self) -> str | None:
        """The content that the request runs on, for the log; None for the base alone."""
        return ",".join(self._digest_headers().values()) or None

    @property
    def headers(self) -> dict[str, str]:
        """Which content the request ran on; one value for each of the first prompts if they differ."""
        [only, *others] = set(self.versions)
        if only is None or others or self.mixed:
            return self._digest_headers()
        return self._digest_headers() | {GENERATION_HEADER.lower(): str(only.generation)}

    def _digest_headers(self) -> dict[str, str]:
        digests = [None if version is None else version.digest for version in self.versions]
        if len(set(digests)) > 1:
            shown = ("-" if digest is None else digest[:SHOWN_DIGITS] for digest in digests[:SHOWN_PROMPTS])
            return {"x-adapter-digests": ", ".join(shown)}
        return {} if digests[0] is None else {"x-adapter-digest": digests[0]}


@asynccontextmanager
async def adapters_in_use(
    request: GenerationRequest, base: str, versions: Seen, mixes: Mixes, least: int | None = None
) -> AsyncIterator[Adapters]:
    """The adapters that a request asks for, kept also if their names are meanwhile given to other versions.

    `versions` are those that the caller sees, `least` is the generation that its adapter has at least. Raises
    RequestError, also if the request asks for an adapter in two ways.
    """
    await know(_names(request), base, versions, least)
    async with AsyncExitStack() as kept:  # from here to `using` nothing is awaited
        adapters = _resolve(request, base, versions)
        parts = _parts(request, base, versions)
        if parts is not None and not all(version is None for version in adapters.versions):
            message = (
                f"adapters is a mix, and model {request.model!r} is an adapter: send the base model's name, {base!r}"
            )
            raise RequestError("conflicting_adapters", message, "adapters")
        used = adapters.versions if parts is None else [part.version for part in parts]
        for version in {version.name: version for version in used if version is not None}.values():
            kept.enter_context(versions.using(version))
        if parts and (len(parts) > 1 or parts[0].weight != 1.0):
            adapters = Adapters((await kept.enter_async_context(mixes.using(parts)),), mixed=True)
        elif parts:
            adapters = Adapters((parts[0].version,))
        yield adapters


def _names(request: GenerationRequest) -> list[str]:
    """Every name of a model that a request has, once."""
    values = [getattr(request, field, None) for field in FIELDS]
    lists = [value if isinstance(value, list) else [value] for value in values]
    names = [request.model, *(name for names in lists for name in names), *(request.adapters or ())]
    return list(dict.fromkeys(name for name in names if name is not None))


def _resolve(request: GenerationRequest, base: str, versions: Seen) -> Adapters:
    """What model, lora_path and adapter_id name. Raises RequestError, also if they name different adapters."""
    named = find_version(request.model, base, versions, "model")
    asked = {field: value for field in FIELDS if (value := getattr(request, field, None)) is not None}
    if len(asked) > 1 and any(isinstance(value, list) for value in asked.values()):
        first, second = asked.values()
        if first != second:
            message = "lora_path and adapter_id name different adapters: send one of them"
            raise RequestError("conflicting_adapters", message, "adapter_id")
    adapters = Adapters((named,))
    for field, value in asked.items():
        if not isinstance(value, list):
            adapters = Adapters((_other(request.model, named, field, value, base, versions),))
            named = adapters.versions[0]
            continue
        places = [f"{field}[{index}]" for index in range(len(value))]
        found = (_other(request.model, named, *each, base, versions) for each in zip(places, value, strict=True))
        adapters = Adapters(tuple(found), field)
    return adapters


def _other(
    model: str, named: AdapterVersion | None, field: str, name: str | None, base: str, versions: Seen
) -> AdapterVersion | None:
    """The adapter that another field names; it may only repeat the one that is named already."""
    other = None if name is None else find_version(name, base, versions, field)
    if named is not None and other is not named:
        shown = "null, the base," if name is None else repr(name)
        message = f"model {model!r} and {field} {shown} are different adapters: name one"
        raise RequestError("conflicting_adapters", message, field)
    return other


def _parts(request: GenerationRequest, base: str, versions: Seen) -> list[Weighted] | None:
    """The parts of the mix that a request asks for, without those of weight 0; None if it asks for none."""
    if request.adapters is None:
        return None
    if given := [field for field in FIELDS if getattr(request, field, None) is not None]:
        message = f"adapters is a mix, and {given[0]} names an adapter too: send one of them"
        raise RequestError("conflicting_adapters", message, "adapters")
    parts = []
    for name, weight in request.adapters.items():
        field = f"adapters.{name}"
        version = find_version(name, base, versions, field)
        if version is None:
            message = f"{field} is the base model: the weights are of adapters, whose sum is added to the base"
            raise RequestError("invalid_field", message, field)
        if not math.isfinite(weight):
            raise RequestError("invalid_field", f"{field} is {weight}, expected a finite weight", field)
        if weight:
            parts.append(Weighted(name, version, weight))
    return parts


def find_version(name: str, base: str, versions: Seen, param: str) -> AdapterVersion | None:
    """The adapter that goes by a name, None for the base; `versions` are those that the caller sees.

    Raises RequestError.

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
        raise _no_model(name, param)
    if not (DIGEST.fullmatch(digest) and version.digest.startswith(digest)):
        message = f"adapter {wanted!r} is now {version.digest}, not {digest!r} (give at least 8 of its hex digits)"
        raise RequestError("model_not_found", message, param)
    return version


async def know(names: Sequence[str], base: str, versions: Seen, least: int | None = None) -> None:
    """Have those names read from the store that memory does not know, or of which it knows too old a generation.

    `least` is that of the one adapter among them; the base has no generations. Raises RequestError as `Seen.know` does;
    what is unknown after that is for `find_version` to refuse.
    """
    adapters = [name for name in names if name != base]
    if least is not None and len(adapters) > 1:
        message = f"{GENERATION_HEADER} is of one adapter, and this request names {len(adapters)}: leave it out"
        raise RequestError("invalid_header", message, GENERATION_HEADER)
    for name in adapters:
        if not await _known(name, base, versions, least):
            return


async def _known(name: str, base: str, versions: Seen, least: int | None) -> bool:
    """Whether there is an adapter that goes by a name, in memory or else in the store."""
    readings = _readings(name, base)
    for reading in readings:
        if _found(name, base, versions) is not None:
            break
        await versions.look_up(reading)
    found = _found(name, base, versions)
    if least is not None:
        await versions.know(readings[0] if found is None else found.name, least)
    return found is not None


def _found(name: str, base: str, versions: Seen) -> AdapterVersion | None:
    with suppress(RequestError):
        return find_version(name, base, versions, "model")
    return None


def _readings(name: str, base: str) -> list[str]:
    """The names of adapters that a name may mean, the likeliest first."""
    own = name.removeprefix(f"{base}:")
    wanted, _, digest = own.rpartition("@")
    readings = [wanted, own, name] if DIGEST.fullmatch(digest) else [own, name]
    return list(dict.fromkeys(readings))


async def list_models(request: Request) -> Response:
    return json_response(ModelList(data=_cards(request)))


async def get_model(request: Request) -> Response:
    name, services = request.path_params["model"], services_of(request)
    seen = Seen(services.catalog, caller_of(request))
    await know([name], services.settings.served_name, seen, least_generation(request.headers))
    for card in _cards(request):
        if card.id == name:
            return json_response(card)
    raise _no_model(name, "model")


def _no_model(name: str, param: str) -> RequestError:
    message = f"there is no model or adapter {name!r}: GET /v1/models lists those there are"
    return RequestError("model_not_found", message, param)


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

    named = Seen(services.catalog, caller_of(request)).list()
    return [
        card(base, services.started_at, None),
        *(card(version.name, version.record.created_at, base) for version in named),
    ]
