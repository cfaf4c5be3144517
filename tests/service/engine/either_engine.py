"""An engine process, fake or real, for the suite that both pass: it gets commands, and its events are awaited."""

import asyncio
import json
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from runtime.adapter_format.canonical import canonical_from_tensors
from runtime.config import EngineConfig
from runtime.messages import (
    Answer,
    Command,
    Event,
    Failed,
    Generate,
    GetStats,
    HoldPrefix,
    PinsSet,
    RegisterAdapter,
    SamplingParams,
    SetPins,
    Stats,
    Tier,
    Tokens,
)
from runtime.models.config import ModelConfig
from service.engine.process import EngineProcess
from tests.service.adapters.adapter_bundles import config as adapter_config
from tests.service.adapters.adapter_bundles import tensors
from tests.service.engine import fake_engine

COMMANDS = {"fake": fake_engine.COMMAND, "real": (sys.executable, "-m", "runtime.process")}
DEADLINE_SECONDS = 20
ADAPTER_BYTES = 1280  # of one in device memory: A and B of rank 2 on 16 features, in panels of 16, and scales
BLOCK_BYTES = 2048  # layers, tokens, K and V, features of a head, float32
MAX_MODEL_LEN, MAX_RUNNING, MAX_WAITING = 4096, 4, 2
PROMPT = list(range(20, 69))  # three whole blocks and a token
SEEDS = count()  # of adapters: none is like another
T = TypeVar("T", bound=Event)


class Engine:
    """An engine process and the events that it has sent."""

    def __init__(self, command: tuple[str, ...], config: EngineConfig):
        self._runner = asyncio.Runner()
        self._requests = 0
        self._runner.run(self._start(command, config))

    async def _start(self, command: tuple[str, ...], config: EngineConfig) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.process = EngineProcess(command)
        self.ready = await self.process.start(config, self._events.put_nowait)

    def close(self) -> None:
        self._runner.run(self.process.close())
        self._runner.close()

    def send(self, *commands: Command) -> None:
        self._runner.run(self._send(commands))

    async def _send(self, commands: tuple[Command, ...]) -> None:
        for command in commands:
            self.process.send(command)

    def next(self, kind: type[T], **fields: Any) -> T:
        """The next event of a kind that has these values; those before it are dropped."""
        return self._runner.run(self._next(kind, fields))

    async def _next(self, kind: type[T], fields: dict[str, Any]) -> T:
        passed: list[Event] = []
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while True:
                    event = await self._events.get()
                    if isinstance(event, kind) and all(getattr(event, name) == fields[name] for name in fields):
                        return event
                    passed.append(event)
        except TimeoutError:
            raise AssertionError(f"no {kind.__name__} with {fields} came, but {passed[-5:]}") from None

    def new_id(self) -> str:
        self._requests += 1
        return f"request {self._requests}"

    def ask(self, kind: type[Command], **fields: Any) -> str | None:
        """Send a command that is answered; the code of a refusal."""
        request_id = self.new_id()
        self.send(kind(request_id=request_id, **fields))
        return self.next(Answer, request_id=request_id).code

    def set_pins(self, pins: dict[str, Tier]) -> dict[str, str]:
        """Ask for pins; the codes of those that are refused, by digest."""
        request_id = self.new_id()
        self.send(SetPins(request_id=request_id, pins=pins))
        answer = self.next(PinsSet, request_id=request_id)
        return {digest: refusal.code for digest, refusal in answer.refused.items()}

    def generate(self, token_ids: list[int] = PROMPT, **fields: Any) -> list[Tokens]:
        """All events of a request that runs to its end."""
        command = request(self.new_id(), token_ids, **fields)
        self.send(command)
        events = [self.next(Tokens, request_id=command.request_id)]
        while events[-1].finish_reason is None:
            events.append(self.next(Tokens, request_id=command.request_id))
        return events

    def refusal(self, command: Generate | HoldPrefix) -> str:
        self.send(command)
        return self.next(Failed, request_id=command.request_id).code

    def hold(self, prefix_id: str, token_ids: list[int], **fields: Any) -> HoldPrefix:
        return HoldPrefix(request_id=self.new_id(), prefix_id=prefix_id, token_ids=token_ids, **fields)

    def stats(self) -> Stats:
        self.send(GetStats())
        return self.next(Stats)

    def died(self) -> str:
        return self._runner.run(asyncio.wait_for(self.process.ended(), DEADLINE_SECONDS)).reason


def request(request_id: str, token_ids: list[int] = PROMPT, max_tokens: int = 5, **fields: Any) -> Generate:
    """A greedy request; `fields` are those of Generate or of SamplingParams."""
    params = {name: fields.pop(name) for name in list(fields) if name in SamplingParams.__struct_fields__}
    sampling = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **params})
    return Generate(request_id=request_id, token_ids=token_ids, params=sampling, **fields)


def endless(request_id: str, **fields: Any) -> Generate:
    """A request that runs until it is aborted: "hold" scripts the fake engine, to the real one it is any salt."""
    return request(request_id, max_tokens=MAX_MODEL_LEN, cache_salt="hold", **fields)


def tokens_of(events: list[Tokens]) -> list[int]:
    return [token for event in events for token in event.token_ids]


@dataclass
class Adapter:
    """An adapter's digest and canonical file, which is yet to be written to its path."""

    digest: str
    path: Path
    content: bytes

    def register(self) -> RegisterAdapter:
        return RegisterAdapter(digest=self.digest, path=str(self.path))

    def write(self) -> None:
        self.path.write_bytes(self.content)


def start(kind: str, model: Path, **options: Any) -> Engine:
    config = EngineConfig(
        model=str(model),
        load_format="dummy",
        threads=1,
        max_model_len=MAX_MODEL_LEN,
        max_running=MAX_RUNNING,
        max_waiting=MAX_WAITING,
        kv_cache_bytes=400 * BLOCK_BYTES,
        adapter_bytes=3 * ADAPTER_BYTES,
        host_adapter_bytes=4 * ADAPTER_BYTES,
        log_level="warning",
        **options,
    )
    return Engine(COMMANDS[kind], config)


def make_adapter(model: Path, directory: Path) -> Adapter:
    config = ModelConfig.from_directory(model)
    digest, file = canonical_from_tensors(tensors(next(SEEDS)), json.loads(adapter_config()), config, max_rank=8)
    return Adapter(digest, directory / f"{digest}.safetensors", file.data.tobytes())
