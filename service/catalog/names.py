"""The durable half of the catalog: one small object for each name, with the record that the name points at."""

import logging
import re

import msgspec

from service.catalog.record import AdapterRecord
from storage.store import NotFound, Store, StoreError, StoreLost

_log = logging.getLogger(__name__)
_PREFIX, _SUFFIX = "names/", ".json"
# Names of several words, which are no keys themselves, are escaped. They have no suffix: a segment of a key has at most
# 255 characters, and a name of 128 has up to 127 to escape.
_ESCAPED = f"{_PREFIX}escaped/"
_ESCAPES = {"_": "__", "/": "_s", "@": "_a", ":": "_c"}
_MEANT = {escape: character for character, escape in _ESCAPES.items()}


class UnreadableName(StoreError):
    """The object of a name is not a valid record of it; the message says why."""


class AdapterNames:
    """Reads and writes the records of names. A write fails if another process wrote the name since the last read.

    A deleted name leaves an empty object behind. So a deletion is a conditional write too, and two processes cannot
    undo each other's changes unseen. All calls block; calls for one name must not overlap.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._etags: dict[str, str] = {}  # by name: of the object as it was last read or written here
        self._revisions: dict[str, str] = {}  # by name: of the object as `changed` last listed it
        self._lost = False  # whether the last list had none of the names that were known

    def changed(self) -> list[str]:
        """The names whose objects any process has written, or somebody removed, since the last call.

        Raises StoreLost if the objects of all names are gone: no process removes any. The names stay known then.
        """
        listed = {_name(entry.key): entry.revision for entry in self._store.list(_PREFIX)}
        found = {name: revision for name, revision in listed.items() if name is not None}
        gone = self._revisions.keys() - found.keys()
        self._lost = bool(gone) and gone == self._revisions.keys()
        self._require_names()
        for name in sorted(gone):
            _log.error(
                "the object of adapter %s is gone from the store, and no server removes one: so is the name", name
            )
        names = [name for name in {**found, **self._revisions} if found.get(name) != self._revisions.get(name)]
        self._revisions = found
        return sorted(names)

    def again(self, name: str) -> None:
        """Make `changed` return a name once more: it could not be read."""
        self._revisions[name] = ""

    def read(self, name: str) -> AdapterRecord | None:
        """The record of a name, None if the name points at nothing. Raises UnreadableName, StoreError."""
        try:
            stored = self._store.get(_key(name))
        except NotFound:
            self._etags.pop(name, None)
            return None
        self._etags[name] = stored.etag  # of a broken object too: a later upload may replace it
        if not stored.content:
            return None
        try:
            record = msgspec.json.decode(stored.content, type=AdapterRecord)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UnreadableName(f"{_key(name)}: {error}") from error
        if record.name != name:
            raise UnreadableName(f"{_key(name)}: it says that its name is {record.name!r}")
        return record

    def buried(self, name: str) -> bool:
        """Whether there was an object of the name when it was last read, with a record or without one."""
        return name in self._etags

    def write(self, record: AdapterRecord) -> None:
        """Store a name's record. Raises PreconditionFailed if the object has changed since it was read."""
        self._put(record.name, msgspec.json.encode(record))

    def bury(self, name: str) -> None:
        """Make a name point at nothing. Raises PreconditionFailed if the object has changed since it was read."""
        self._put(name, b"")

    def _put(self, name: str, content: bytes) -> None:
        self._require_names()
        etag = self._etags.get(name)
        self._etags[name] = self._store.put(_key(name), content, if_match=etag, if_none_match=etag is None)

    def _require_names(self) -> None:
        if self._lost:
            raise StoreLost(
                f"the objects of all {len(self._revisions)} names are gone from the store, and no server removes one: "
                "bring them back, or restart the server, which then goes on with what is there now"
            )


def _key(name: str) -> str:
    if not set(name) & {"/", "@", ":"}:
        return f"{_PREFIX}{name}{_SUFFIX}"
    return _ESCAPED + "".join(_ESCAPES.get(character, character) for character in name)


def _name(key: str) -> str | None:
    """The name whose key this is; None for an object of another kind."""
    if key.startswith(_ESCAPED):
        return re.sub("_.", lambda escape: _MEANT.get(escape[0], ""), key.removeprefix(_ESCAPED))
    return key.removeprefix(_PREFIX).removesuffix(_SUFFIX) if key.endswith(_SUFFIX) else None
