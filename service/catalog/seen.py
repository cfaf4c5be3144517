"""The names as one caller sees them, in memory and, where memory is not enough, in the store."""

import re
from collections.abc import Mapping

from service.catalog.catalog import Catalog
from service.catalog.record import NAME_PATTERN, AdapterVersion, Condition
from service.catalog.versions import no_adapter
from service.errors import RequestError
from service.keys.caller import Caller

_NAME = re.compile(NAME_PATTERN)
GENERATION_NUMBER = "[1-9][0-9]{0,17}"
# Of a request: the least that it may be answered with; of an answer: the one that it is of. As Vault has X-Vault-Index,
# whose servers also answer 412 while they are behind
GENERATION_HEADER = "X-Adapter-Generation"


def least_generation(headers: Mapping[str, str]) -> int | None:
    """The generation that a request's adapter has at least. Raises RequestError `invalid_header`."""
    given = headers.get(GENERATION_HEADER)
    if given is None:
        return None
    if not re.fullmatch(GENERATION_NUMBER, given):
        message = f"{GENERATION_HEADER} must be the number of a generation, as an upload's answer has it"
        raise RequestError("invalid_header", message, GENERATION_HEADER)
    return int(given)


class Seen:
    """The versions whose names a caller sees; every other name is as one that does not exist."""

    def __init__(self, catalog: Catalog, caller: Caller) -> None:
        self._catalog, self._versions, self._caller = catalog, catalog.versions, caller
        self.using = catalog.versions.using

    def resolve(self, name: str) -> AdapterVersion | None:
        """As `Versions.resolve`."""
        return self._versions.resolve(name) if self._caller.sees(name) else None

    def draining(self, name: str) -> AdapterVersion | None:
        """As `Versions.draining`."""
        return self._versions.draining(name) if self._caller.sees(name) else None

    def list(self) -> list[AdapterVersion]:
        """As `Versions.list`."""
        return [version for version in self._versions.list() if self._caller.sees(version.name)]

    def require(self, name: str) -> None:
        """Raise RequestError `adapter_not_found` for a name that there cannot be, or that the caller does not see."""
        if not (_NAME.match(name) and self._caller.sees(name)):
            raise no_adapter(name)

    async def look_up(self, name: str) -> bool:
        """As `Catalog.look_up`, of a name that there can be and that the caller sees; others cost no read."""
        if not (_NAME.match(name) and self._caller.sees(name)):
            return True
        return await self._catalog.look_up(name)

    async def know(self, name: str, least: int | None = None) -> None:
        """Read a name from the store if memory does not know it, or only a generation below `least`.

        Raises RequestError: `generation_not_reached` if the store has no such generation, `generation_unknown` if it
        was not asked. A name that the store does not know is nothing to raise for: whoever resolves it finds none.
        """
        if self._reaches(name, least) or await self.look_up(name):
            version = self.resolve(name)
            if least is not None and version is not None and version.generation < least:
                raise RequestError(
                    "generation_not_reached",
                    f"adapter {name!r} has generation {version.generation}, here and in the store, and this request "
                    f"asks for {least} or a later one",
                    GENERATION_HEADER,
                )
        elif least is not None:
            message = (
                f"this server does not know generation {least} of adapter {name!r} yet, and could not ask the store: "
                "send the request again"
            )
            raise RequestError("generation_unknown", message, GENERATION_HEADER)

    async def reconsider(self, name: str, condition: Condition) -> None:
        """Read a name from the store if memory says that a condition of a change does not hold."""
        try:
            self._versions.require(name, condition)
        except RequestError:
            await self.look_up(name)

    def _reaches(self, name: str, least: int | None) -> bool:
        version = self.resolve(name)
        return version is not None and version.generation >= (least or 0)
