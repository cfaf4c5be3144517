"""The crossing to the engine that serves now: commands go over, answers come back by request id."""

import asyncio
import itertools
import logging
from typing import Any, TypeVar

from runtime.messages import Answer, Command, PinsSet, Ready
from service.engine.process import EngineProcess
from service.errors import EngineError

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Connection:
    """The engine process that serves now, if there is one, shared by the parts of `EngineClient`."""

    def __init__(self) -> None:
        self.process: EngineProcess | None = None
        self.ready: Ready | None = None  # what the engine said of itself; None while no engine serves
        self._numbers = itertools.count()
        self._answers: dict[str, asyncio.Future[Answer | PinsSet]] = {}  # by request id

    def send(self, command: Command) -> None:
        """Send a command if an engine serves; a later engine hears of adapters and pins again, not of the rest."""
        if self.ready is not None and self.process is not None:
            self.process.send(command)

    def require(self) -> EngineProcess:
        """The process that serves. Raises EngineError if there is none."""
        if self.ready is None or self.process is None:
            raise EngineError("engine_unavailable", "the engine is not running; it is being restarted")
        return self.process

    def new_id(self) -> str:
        return f"ask-{next(self._numbers)}"

    async def ask(self, request_id: str, command: Command) -> Answer | PinsSet:
        """Send a command and return its answer. Raises EngineError: a refusal, the engine's death, or no engine."""
        self.require()
        asked: asyncio.Future[Answer | PinsSet] = asyncio.get_running_loop().create_future()
        self._answers[request_id] = asked
        self.send(command)
        try:
            answer = await asked
        finally:
            del self._answers[request_id]
        if isinstance(answer, Answer) and answer.code is not None:
            raise EngineError(answer.code, answer.message)
        return answer

    def on_answer(self, answer: Answer | PinsSet) -> None:
        asked = self._answers.get(answer.request_id)
        if asked is not None:
            succeed(asked, answer)
        elif isinstance(answer, PinsSet):  # sent to a new engine, not asked for by anyone
            for digest, refusal in answer.refused.items():
                _log.error("adapter %s is pinned no longer: %s", digest, refusal.message)
        elif answer.code is not None:  # the caller was cancelled
            _log.error("%s: the engine refused: %s", answer.request_id, answer.message)

    def lost(self, failure: EngineError) -> None:
        """The engine died: fail everything that waits for an answer."""
        self.ready = None
        for answer in self._answers.values():
            fail(answer, failure)


def succeed(future: "asyncio.Future[T]", result: T) -> None:
    """Set a future's result, unless its waiter was cancelled."""
    if not future.done():
        future.set_result(result)


def fail(future: "asyncio.Future[Any]", failure: EngineError) -> None:
    """Set a future's exception, unless its waiter was cancelled."""
    if not future.done():
        future.set_exception(failure)
