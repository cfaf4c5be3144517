"""A program that is killed at every step that it takes, one step later each time.

usage: python -m tests.service.catalog.killed_catalog OPERATION BASE TARGET [BUCKET]. Each step is one on the file
system and TARGET/N is a copy of the directory BASE in which the operation was killed at its Nth step; with a bucket,
each is a call of the store, and BASE and TARGET/N are prefixes. N.done exists in the directory TARGET if the operation
had been acknowledged before. The last one, which was not killed any more, is printed.
"""

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3

from service.catalog.files import AdapterStorage, cached_storage, local_storage
from storage.cache import DiskCache
from storage.s3 import S3Store
from tests.service.catalog.catalogs import FREE, opened, publish

STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "os.truncate", "fcntl.flock"}


class KilledStore:
    """A store whose process ends before one of its calls, which is to say after another."""

    def __init__(self, store: S3Store, step: int) -> None:
        self._store, self._left = store, step

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._store, name)

        def killed(*arguments: Any, **options: Any) -> Any:
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self._left -= 1
            return call(*arguments, **options)

        return killed


async def operate(operation: str, storage: AdapterStorage, done: Path) -> None:
    async with opened(storage) as catalog:
        if operation == "upload":
            await publish(catalog, "second", seed=1)
        elif operation == "replace":
            await publish(catalog, "first", seed=1, pin=True)
        elif operation == "ephemeral":
            await publish(catalog, "passing", seed=2, ephemeral=True)
        elif operation == "pin":
            await catalog.set_pin("first", "device", FREE)
        elif operation == "delete":
            await catalog.delete("first", FREE)
        elif operation == "collect":
            await catalog.collect(-1)
        await asyncio.to_thread(done.touch)


def kill_at(step: int) -> None:
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in STEPS and not str(arguments[0]).endswith((".py", ".pyc", "__pycache__")):
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(hook)


def copy_prefix(client: Any, bucket: str, base: str, target: str) -> None:
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=f"{base}/")["Contents"]:
        key = f"{target}/{entry['Key'].removeprefix(f'{base}/')}"
        client.copy_object(Bucket=bucket, Key=key, CopySource={"Bucket": bucket, "Key": entry["Key"]})


def child(operation: str, target: Path, step: int, bucket: str | None) -> None:
    """Do the operation and end, one way or the other."""
    directory = target / str(step)
    if bucket is None:
        kill_at(step)
        storage = local_storage(directory)
    else:
        store = KilledStore(S3Store(bucket, f"{target.name}/{step}"), step)
        storage = cached_storage(store, DiskCache(directory, 1 << 20))
    asyncio.run(operate(operation, storage, target / f"{step}.done"))
    os._exit(0)


def main(operation: str, base: Path, target: Path, bucket: str | None = None) -> None:
    step, killed = 0, True
    client = None if bucket is None else boto3.session.Session().client("s3")
    while killed:
        if bucket is None:
            shutil.copytree(base, target / str(step))
        else:
            copy_prefix(client, bucket, base.name, f"{target.name}/{step}")
        process = os.fork()
        if process == 0:
            child(operation, target, step, bucket)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert status in (0, -signal.SIGKILL), status
        killed, step = status != 0, step + 1
    print(step - 1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
