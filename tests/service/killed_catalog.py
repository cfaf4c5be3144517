"""A program that is killed at every step that it takes on the file system, one step later each time.

usage: python -m tests.service.killed_catalog OPERATION BASE TARGET. For each step, TARGET/N is a copy of BASE in
which the operation was killed at its Nth step; TARGET/N.done exists if it had been acknowledged before. The last
one, which was not killed any more, is printed.
"""

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path

from tests.service.catalogs import FREE, opened, publish

STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "os.truncate", "fcntl.flock"}


async def operate(operation: str, directory: Path, done: Path) -> None:
    async with opened(directory) as catalog:
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


def main(operation: str, base: Path, target: Path) -> None:
    step, killed = 0, True
    while killed:
        directory = target / str(step)
        shutil.copytree(base, directory)
        child = os.fork()
        if child == 0:
            kill_at(step)
            asyncio.run(operate(operation, directory, target / f"{step}.done"))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), status
        killed, step = status != 0, step + 1
    print(step - 1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
