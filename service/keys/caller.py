"""Who makes a request: what a key allows, which names it sees, and what it uses."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from starlette.requests import Request

from service.keys.limits import KeyUsage

Scope = Literal["generate", "manage", "admin"]
ALL_SCOPES: frozenset[Scope] = frozenset(get_args(Scope))
CALLER = "rootstock.caller"  # in a request's scope


@dataclass(frozen=True, kw_only=True, eq=False)
class Caller:
    """A key as requests use it. The id, not the secret, owns what it makes: another key of the same id goes on."""

    id: str | None  # None: no key is asked for
    scopes: frozenset[Scope]
    adapter_prefix: str = ""  # of every name of an adapter that it sees
    disk_bytes: int | None = None  # of the adapters that it uploads; None: any number
    pinned_bytes: int | None = None  # of those that it pins
    apart: bool = False  # it shares no K/V with other keys
    tenant: str = ""  # whose turn it is when its requests run; empty: that of their cache_salt
    usage: KeyUsage = field(default_factory=KeyUsage)

    def sees(self, name: str) -> bool:
        """Whether an adapter of this name may be there for it."""
        return name.startswith(self.adapter_prefix)

    def owns(self, id: str | None) -> bool:
        """Whether what was made with the key of an id is its own."""
        return id == self.id

    def salt(self, given: str | None) -> str:
        """The salt of its K/V, from the one that a request gives. Ids have no slash, so no other key has it."""
        return f"{self.id}/{given or ''}" if self.apart else given or ""


ANYONE = Caller(id=None, scopes=ALL_SCOPES)  # where no key is asked for


def caller_of(request: Request) -> Caller:
    caller: Caller = request.scope.get(CALLER, ANYONE)
    return caller
