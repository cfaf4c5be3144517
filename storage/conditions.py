"""Whether a store keeps the conditions of writes: servers that share one lose each other's names if it does not."""

from contextlib import suppress
from typing import Any
from uuid import uuid4

from storage.store import PreconditionFailed, Store, StoreError


def require_conditions(store: Store) -> None:
    """Write an object of its own as the names of adapters are written, and delete it. Raises StoreError."""
    key = f"probes/{uuid4().hex}"
    etag = store.put(key, b"1", if_none_match=True)
    try:
        changed = store.put(key, b"2", if_match=etag)
        ignored = [
            name
            for name, conditions in (("If-None-Match", {"if_none_match": True}), ("If-Match", {"if_match": etag}))
            if _writes(store, key, conditions)
        ]
        if ignored or changed == etag:
            what = " and ".join(ignored) or "ETags"
            raise StoreError(
                f"the store ignores {what} of a PUT, so adapters of one server would overwrite those of another: use a "
                "server that keeps conditional writes (S3, MinIO, Ceph, R2), or a directory (--data-directory)"
            )
    finally:
        with suppress(StoreError):  # what is left of it is 1 byte
            store.delete(key)


def _writes(store: Store, key: str, conditions: dict[str, Any]) -> bool:
    try:
        store.put(key, b"3", **conditions)
    except PreconditionFailed:
        return False
    return True
