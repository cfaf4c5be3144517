"""The keys that may call, and what each of them uses."""

import asyncio
import hmac
import logging
from pathlib import Path
from typing import NamedTuple

from service.errors import RequestError
from service.keys.caller import ALL_SCOPES, Caller
from service.keys.keys_file import API_KEY, KeyRecord, KeysFileError, hash_of, id_of, read_keys
from service.keys.limits import KeyUsage

RELOAD_SECONDS = 1.0  # from one look at the file to the next
_log = logging.getLogger(__name__)


class _Key(NamedTuple):
    hash: str
    caller: Caller


_NOBODY = "0" * 64  # the hash of no key: one of an unknown id is compared as any other


class Keys:
    """Owns the keys of a file and of the option, and the usage of each by its id, also of those that are revoked.

    Raises KeysFileError with a sentence.
    """

    def __init__(self, api_key: str | None, file: Path | None, *, share_cache: bool = False) -> None:
        self._file, self._share_cache = file, share_cache
        self._keys: dict[str, _Key] = {}  # by id
        self.usage: dict[str, KeyUsage] = {}  # by id, in the order in which the ids came up
        self.unknown = KeyUsage()  # requests without a valid key
        self._option = None if api_key is None else _Key(hash_of(api_key), self._option_caller())
        self._seen = self._signature()
        if file is not None:
            self._take(read_keys(file))

    @property
    def needed(self) -> bool:
        """Whether requests need a key."""
        return self._file is not None or self._option is not None

    def caller(self, authorization: str) -> Caller:
        """Who sends this header. Raises RequestError `invalid_api_key`."""
        kind, _, key = authorization.partition(" ")
        key = key.strip()
        if kind.lower() != "bearer" or not key:
            raise RequestError("invalid_api_key", "this server needs an API key: send `Authorization: Bearer KEY`")
        if not key.isascii():
            raise RequestError("invalid_api_key", "the API key has characters that no key has: all of them are ASCII")
        given, named = hash_of(key), self._keys.get(id_of(key) or "")
        for known in (named, self._option):  # by hash, so that the time tells nothing of a key
            if hmac.compare_digest(given, _NOBODY if known is None else known.hash) and known is not None:
                return known.caller
        raise RequestError("invalid_api_key", "the API key is not valid: it is mistyped, revoked or another server's")

    async def follow(self) -> None:
        """Read the file again whenever it changes; never returns. The keys stay while it is broken or missing."""
        while self._file is not None:
            await asyncio.sleep(RELOAD_SECONDS)
            seen = await asyncio.to_thread(self._signature)
            if seen == self._seen:
                continue
            self._seen = seen
            try:
                self._take(await asyncio.to_thread(read_keys, self._file))
            except KeysFileError as error:
                _log.error("%s; the keys of before stay valid", error)
            else:
                _log.info("%s has changed: %d keys are valid", self._file, len(self._keys))

    def _signature(self) -> tuple[int, int, int] | None:
        """What differs when the file has changed; None while there is none."""
        try:
            found = None if self._file is None else self._file.stat()
        except OSError:
            return None
        return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)

    def _take(self, records: list[KeyRecord]) -> None:
        keys = {record.id: _Key(record.hash, self._caller(record)) for record in records}
        for id in self._keys.keys() - keys.keys():
            _log.info("the key %s is revoked", id)
        self._keys = keys

    def _caller(self, record: KeyRecord) -> Caller:
        usage = self.usage.setdefault(record.id, KeyUsage())
        usage.limit(record.limits)
        return Caller(
            id=record.id,
            scopes=frozenset(record.scopes),
            adapter_prefix=record.adapter_prefix,
            disk_bytes=record.disk_bytes,
            pinned_bytes=record.pinned_bytes,
            apart=not self._share_cache,
            tenant=record.id,
            usage=usage,
        )

    def _option_caller(self) -> Caller:
        """The option's key may do everything. Where it is the only one, there is nobody to be kept apart from."""
        usage = self.usage.setdefault(API_KEY, KeyUsage())
        alone = self._file is None
        apart = not (alone or self._share_cache)
        return Caller(id=API_KEY, scopes=ALL_SCOPES, apart=apart, tenant="" if alone else API_KEY, usage=usage)
