"""What the adapters that keys have uploaded and pinned take, and whether a change leaves a key within its quotas."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from service.catalog.record import AdapterRecord
from service.catalog.versions import Versions
from service.errors import RequestError
from service.keys.caller import Caller


class Used(NamedTuple):
    """What a key's names take. Names of one content share it, so it counts once."""

    disk_bytes: int  # of what it uploaded, in memory if that is ephemeral
    pinned_bytes: int  # of what it pinned, by the sizes of the files


NOTHING = Used(0, 0)


class Quotas:
    """Owns the changes of names that are under way, so that changes at one time count each other.

    Who uploaded and who pinned a name is in its record: so this holds after a restart, and for the names that other
    servers on the store have written as soon as this one has read them.
    """

    def __init__(self, versions: Versions) -> None:
        self._versions = versions
        self._changing: dict[str, AdapterRecord] = {}  # by name: as it is going to be

    def used(self) -> dict[str, Used]:
        """What the names of each key take, by its id, as they are going to be."""
        return _used(self._records().values())

    def require_room(self, name: str, caller: Caller) -> None:
        """Raise RequestError for an upload to a full quota before its bytes are read.

        Not for a name that the key has uploaded before: the same content, or a smaller one, needs no room.
        """
        if caller.id is None or caller.disk_bytes is None:
            return
        records = self._records()
        used = _used(records.values()).get(caller.id, NOTHING).disk_bytes
        own = name in records and records[name].uploaded_by == caller.id
        if used >= caller.disk_bytes and not own:
            raise _exceeded("disk_quota_exceeded", "uploaded", used, caller.disk_bytes, "delete some")

    def admit(self, record: AdapterRecord, caller: Caller) -> None:
        """Count a name as it is going to be, until `settle`. Raises RequestError if that exceeds a quota of the key."""
        if caller.id is not None:
            before = self.used().get(caller.id, NOTHING)
            after = _used({**self._records(), record.name: record}.values()).get(caller.id, NOTHING)
            disk, pinned = caller.disk_bytes, caller.pinned_bytes
            if disk is not None and after.disk_bytes > max(disk, before.disk_bytes):
                raise _exceeded("disk_quota_exceeded", "uploaded", after.disk_bytes, disk, "delete some")
            if pinned is not None and after.pinned_bytes > max(pinned, before.pinned_bytes):
                raise _exceeded("pinned_quota_exceeded", "pinned", after.pinned_bytes, pinned, "unpin some")
        self._changing[record.name] = record

    def settle(self, name: str) -> None:
        """The change of a name has been made, or not."""
        self._changing.pop(name, None)

    def check(self) -> None:
        """Assert that nothing is being changed."""
        assert not self._changing, f"{list(self._changing)} are still being changed"

    def _records(self) -> Mapping[str, AdapterRecord]:
        return {version.name: version.record for version in self._versions.list()} | self._changing


def _used(records: Iterable[AdapterRecord]) -> dict[str, Used]:
    uploaded: dict[str | None, dict[str, int]] = {}  # by key: bytes by digest
    pinned: dict[str | None, dict[str, int]] = {}
    for record in records:
        uploaded.setdefault(record.uploaded_by, {})[record.digest] = record.bytes
        if record.pinned:
            pinned.setdefault(record.pinned_by, {})[record.digest] = record.bytes
    return {
        id: Used(sum(uploaded.get(id, {}).values()), sum(pinned.get(id, {}).values()))
        for id in {*uploaded, *pinned}
        if id is not None
    }


def _exceeded(code: str, done: str, bytes: int, quota: int, advice: str) -> RequestError:
    message = f"the adapters that this key has {done} would take {bytes} bytes, and its quota is {quota}: {advice}"
    return RequestError(code, message)
