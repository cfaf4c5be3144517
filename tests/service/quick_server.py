"""Servers of tests that end without waiting."""

import asyncio
from typing import Any

from uvicorn import server

LONGEST_SECONDS = 0.01


class QuickSleep:
    """asyncio, whose `sleep` is short."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(min(seconds, LONGEST_SECONDS))


def quicken_the_server() -> None:
    """Have uvicorn look more often whether a server is to end and whether its connections are closed.

    It looks ten times a second and first waits as long; 0.15 s for each of the 450 servers that the tests end. All of
    its sleeps are such looks.
    """
    server.asyncio = QuickSleep()  # type: ignore[assignment]
