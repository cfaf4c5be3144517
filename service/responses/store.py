"""The responses that clients may come back to, in memory and bounded."""

from collections import OrderedDict
from typing import NamedTuple

import msgspec

from service.errors import RequestError
from service.keys.caller import ANYONE, Caller
from service.responses.schemas import Item, ModelResponse

ENTRY_BYTES = 512  # what an entry takes besides its JSON

_items = msgspec.json.Decoder(list[Item])
_response = msgspec.json.Decoder(ModelResponse)


class Stored(NamedTuple):
    """A response and what it answered, as JSON: it takes a fraction of the memory of the objects."""

    content: bytes
    input: bytes
    previous: "Stored | None"
    size: int  # bytes, with all that came before
    owner: str | None = None  # the id of the key that made it

    @property
    def response(self) -> ModelResponse:
        return _response.decode(self.content)

    @property
    def items(self) -> list[Item]:
        """Of the input of this response alone."""
        return _items.decode(self.input)

    def conversation(self) -> list[Item]:
        """All items up to the end of the response."""
        turns, at = [self], self.previous
        while at is not None:
            turns.append(at)
            at = at.previous
        return [item for turn in reversed(turns) for item in (*turn.items, *turn.response.output)]


class ResponseStore:
    """Keeps responses up to a number of bytes; the one that was used longest ago is forgotten first.

    A response keeps the conversation that led to it alive, also when the earlier responses are forgotten or deleted.
    It is counted with the bytes of all of it, so the sum is never less than what is in memory.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._stored: OrderedDict[str, Stored] = OrderedDict()  # the least recently used first
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def put(
        self, response: ModelResponse, items: list[Item], previous: Stored | None, owner: str | None = None
    ) -> None:
        content, given = msgspec.json.encode(response), msgspec.json.encode(items)
        size = len(content) + len(given) + ENTRY_BYTES + (0 if previous is None else previous.size)
        self._stored[response.id] = Stored(content, given, previous, size, owner)
        self.bytes += size
        while self.bytes > self._most_bytes:
            _, forgotten = self._stored.popitem(last=False)
            self.bytes -= forgotten.size

    def get(self, id: str, caller: Caller = ANYONE) -> Stored:
        """A response of a caller, which is now the most recently used one. Raises RequestError."""
        if id not in self._stored or not caller.owns(self._stored[id].owner):
            raise RequestError("response_not_found", f"there is no response {id!r}: {self._forgotten}", "id")
        self._stored.move_to_end(id)
        return self._stored[id]

    def previous(self, id: str, caller: Caller = ANYONE) -> Stored:
        """The response that a request goes on from. Raises RequestError."""
        try:
            return self.get(id, caller)
        except RequestError:
            message = (
                f"previous_response_id: there is no response {id!r}: {self._forgotten}. "
                "Send the whole conversation as input instead"
            )
            raise RequestError("previous_response_not_found", message, "previous_response_id") from None

    def delete(self, id: str, caller: Caller = ANYONE) -> None:
        """Forget a response. Raises RequestError."""
        self.bytes -= self.get(id, caller).size
        del self._stored[id]

    def check(self) -> None:
        """Recount the bytes."""
        assert self.bytes == sum(stored.size for stored in self._stored.values()) <= self._most_bytes

    @property
    def _forgotten(self) -> str:
        return (
            f"it may have been forgotten. Responses are kept in the memory of the server that gave them, "
            f"up to {self._most_bytes} bytes, unless store was false; those used longest ago go first"
        )
