"""What the engine is told of adapters, and what it says of them."""

import asyncio
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.messages import (
    AdapterState,
    Answer,
    Command,
    FailAdapter,
    LoadAdapter,
    PinAdapter,
    RegisterAdapter,
    RetireAdapter,
    Tier,
    UnloadAdapter,
)

log = logging.getLogger(__name__)


class RequestFailed(Exception):
    """The engine ended a request without a result; `code` is the stable word for why."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code, self.message = code, message


class EngineAdapters(ABC):
    """Remembers which adapters the engine shall know and hold, so that a new engine can be told all of it again.

    `adapter_states` is what the engine said last of each. `on_wanted` is called with the digest of an adapter whose
    file the engine does not find, `on_settled` with that of one for which it does nothing any more, `on_load` with the
    seconds of each stage of a load.
    """

    def __init__(self) -> None:
        self.adapter_states: dict[str, AdapterState] = {}
        self.on_wanted: Callable[[str], None] | None = None
        self.on_settled: Callable[[str], None] | None = None
        self.on_load: Callable[[dict[str, float]], None] | None = None
        self._paths: dict[str, Path] = {}
        self._pins: dict[str, Tier] = {}
        self._told = False  # whether there has been an engine
        self._numbers = itertools.count()
        self._answers: dict[str, asyncio.Future[None]] = {}

    @property
    @abstractmethod
    def serving(self) -> bool:
        """Whether there is an engine to talk to."""

    @abstractmethod
    def _send(self, command: Command) -> None:
        """Send a command, if there is an engine."""

    def register_adapter(self, digest: str, path: Path) -> None:
        """Tell the engine, and every later one, where an adapter's canonical file is, or will be when it is wanted."""
        self._paths[digest] = path
        self._send(RegisterAdapter(digest=digest, path=str(path)))

    def retire_adapter(self, digest: str) -> None:
        """Forget an adapter; what runs on it finishes."""
        self._paths.pop(digest, None)
        self._pins.pop(digest, None)
        self.adapter_states.pop(digest, None)
        self._send(RetireAdapter(digest=digest))

    def fail_adapter(self, digest: str, reason: str) -> None:
        """The file that the engine wants cannot be had."""
        self._send(FailAdapter(digest=digest, reason=reason))

    def load_adapter(self, digest: str, tier: Tier = "device") -> None:
        """Start to bring an adapter into a tier."""
        self._send(LoadAdapter(digest=digest, tier=tier))

    async def bring_adapter(self, digest: str, tier: Tier) -> None:
        """Bring an adapter into a tier, and return when it is there. Raises RequestFailed with why it did not come."""
        self._require_engine()
        await self._ask(number := self._number(), LoadAdapter(request_id=number, digest=digest, tier=tier))

    async def pin_adapter(self, digest: str, tier: Tier | None) -> None:
        """Keep an adapter in a tier, now and in every later engine; None ends that.

        Raises RequestFailed when the engine refuses, or there is none any more; before the first one has started it is
        done then.
        """
        if tier is None:
            self._pins.pop(digest, None)
        if self._told:
            self._require_engine()
            await self._ask(number := self._number(), PinAdapter(request_id=number, digest=digest, tier=tier))
        if tier is not None:
            self._pins[digest] = tier

    async def unload_adapter(self, digest: str, tier: Tier) -> None:
        """Give back an adapter's memory in a tier. Raises RequestFailed when the engine refuses, or there is none."""
        self._require_engine()
        await self._ask(number := self._number(), UnloadAdapter(request_id=number, digest=digest, tier=tier))

    # ------------------------------------------------------------------ for the client

    def _tell_all(self) -> None:
        """Make a new engine know everything that the last one knew."""
        self._told = True
        for digest, path in self._paths.items():
            self._send(RegisterAdapter(digest=digest, path=str(path)))
        for digest, tier in self._pins.items():
            self._send(PinAdapter(request_id=f"again-{digest}", digest=digest, tier=tier))

    def _forget_engine(self, reason: str) -> None:
        """The engine died: what waited for it fails."""
        self.adapter_states.clear()
        failure = RequestFailed("engine_died", reason)
        for answer in self._answers.values():
            fail(answer, failure)

    def _on_answer(self, answer: Answer) -> None:
        asked = self._answers.get(answer.request_id)
        if asked is None:
            if answer.code is not None:
                log.error("%s: the engine refused: %s", answer.request_id, answer.message)
        elif answer.code is None:
            succeed(asked)
        else:
            fail(asked, RequestFailed(answer.code, answer.message))

    def _on_state(self, event: AdapterState) -> None:
        if event.seconds and self.on_load is not None:
            self.on_load(event.seconds)
        if event.state == "retired" or event.digest not in self._paths:
            self.adapter_states.pop(event.digest, None)
            return
        self.adapter_states[event.digest] = event
        if event.state == "wanted" and self.on_wanted is not None:
            self.on_wanted(event.digest)
        if event.state not in ("wanted", "loading") and self.on_settled is not None:
            self.on_settled(event.digest)

    # ------------------------------------------------------------------ inside

    async def _ask(self, number: str, command: Command) -> None:
        asked = self._answers[number] = asyncio.get_running_loop().create_future()
        self._send(command)
        try:
            await asked
        finally:
            del self._answers[number]

    def _number(self) -> str:
        return f"ask-{next(self._numbers)}"

    def _require_engine(self) -> None:
        if not self.serving:
            raise RequestFailed("engine_unavailable", "the engine is not running; it is being restarted")


def succeed(future: "asyncio.Future[Any]", result: Any = None) -> None:
    """Give an answer to whoever still waits for it."""
    if not future.done():
        future.set_result(result)


def fail(future: "asyncio.Future[Any]", failure: RequestFailed) -> None:
    """Give a failure to whoever still waits."""
    if not future.done():
        future.set_exception(failure)
