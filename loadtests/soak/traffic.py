"""Mixed traffic of a soak: generations of all kinds and lengths, while adapters come, change and go."""

import asyncio
import itertools
import json
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import httpx

from loadtests.api_key import bearer
from loadtests.completion_stream import prompts
from loadtests.random_adapter import adapter_file, number_file

RANKS = (4, 8, 16)
STANDING, CHANGING, ACTIVATED = 12, 3, 2  # adapters that are there from the beginning
INVOCATION = (504, 1048)  # of the aLoRAs; tokens that no prompt has beside one another by chance
BEGINNINGS, BEGINNING_WORDS = 48, 120  # of prompts, shared: for the prefix cache and its host memory
MOST_TOKENS, MOST_WORDS = 48, 300
KINDS = {
    "base": 3,
    "adapter": 6,
    "alora": 2,
    "structured": 1,
    "vanish": 2,
    "upload": 1,
    "replace": 1,
    "tier": 1,
}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
# What another client may have done to an adapter in the meantime: used, pinned or replaced it.
RACES = {"adapter_in_use", "adapter_pinned", "load_cancelled", "superseded", "pins_full", "adapter_changed"}
BETWEEN_PINS = "in one piece: unpin one of them"  # in the reason of an "adapter_failed" that others' pins explain


class Refused(Exception):
    """An answer that no race explains."""


class Traffic:
    """Clients of one server, each of which does one thing after another, chosen by its own random numbers."""

    def __init__(
        self, url: str, model_config: Mapping[str, Any], kinds: Mapping[str, int], seed: int, api_key: str = ""
    ) -> None:
        self.done: Counter[str] = Counter()  # by kind
        self._url, self._api_key, self._kinds, self._seed = url, api_key, dict(kinds), seed
        config = dict(model_config)
        self._files = {rank: adapter_file(config, rank, rank) for rank in RANKS}
        self._activated = adapter_file(config, 0, RANKS[0], INVOCATION)
        self._numbers = itertools.count()
        self._beginnings = prompts(BEGINNINGS, BEGINNING_WORDS, "soak")
        self._base = ""

    async def prepare(self) -> None:
        """Upload the adapters that are there from the beginning. Raises Refused, httpx.HTTPError."""
        async with self._client() as client:
            cards = (await self._call(client, "GET", "/v1/models")).json()["data"]
            self._base = next(card["id"] for card in cards if not card["parent"])
            for number in range(STANDING):
                await self._put(client, f"soak-{number}", self._files[RANKS[number % len(RANKS)]])
            for number in range(CHANGING):
                await self._put(client, f"soak-changing-{number}", self._files[RANKS[0]])
            for number in range(ACTIVATED):
                await self._put(client, f"soak-activated-{number}", self._activated)

    async def run(self, clients: int, stop: asyncio.Event) -> None:
        """Do things until `stop`. Raises an ExceptionGroup of Refused and httpx.HTTPError."""
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._work(number, number * len(self._kinds) // clients, stop))

    async def clear(self) -> None:
        """Delete all adapters and drop all K/V. Raises Refused, httpx.HTTPError."""
        async with self._client() as client:
            for each in (await self._call(client, "GET", "/adapters")).json()["adapters"]:
                await self._call(client, "DELETE", f"/adapters/{each['name']}")
            await self._call(client, "POST", "/reset_prefix_cache")

    async def _work(self, number: int, begin: int, stop: asyncio.Event) -> None:
        """Do everything once, from the kind at `begin` on, so that a short run has it all; then by chance."""
        rng = random.Random(f"{self._seed}/{number}")
        kinds, weights = list(self._kinds), list(self._kinds.values())
        once = iter([*kinds[begin:], *kinds[:begin]])
        async with self._client() as client:
            while not stop.is_set():
                kind = next(once, None) or rng.choices(kinds, weights)[0]
                await self._do(kind, client, rng, number)
                self.done[kind] += 1

    async def _do(self, kind: str, client: httpx.AsyncClient, rng: random.Random, number: int) -> None:
        standing = f"soak-{rng.randrange(STANDING)}"
        match kind:
            case "base":
                await self._complete(client, rng, self._base)
            case "adapter":
                await self._complete(client, rng, rng.choice([standing, f"soak-changing-{rng.randrange(CHANGING)}"]))
            case "alora":
                await self._converse(client, rng, f"soak-activated-{rng.randrange(ACTIVATED)}")
            case "structured":
                form = {"json_schema": {"name": "person", "schema": SCHEMA}, "type": "json_schema"}
                await self._complete(client, rng, rng.choice([self._base, standing]), response_format=form)
            case "vanish":
                await self._complete(client, rng, rng.choice([self._base, standing]), leave_after=rng.randrange(6))
            case "upload":
                await self._upload(client, rng, f"soak-new-{number}")
            case "replace":
                await self._put(client, f"soak-changing-{rng.randrange(CHANGING)}", self._files[RANKS[0]])
            case "tier":
                await self._move(client, rng, standing)

    # Generations

    async def _complete(self, client: httpx.AsyncClient, rng: random.Random, model: str, **more: Any) -> None:
        words = round(MOST_WORDS ** rng.random())
        beginning = rng.choice(["", *self._beginnings])
        body = {"model": model, "prompt": f"{beginning} {prompts(1, words, rng.random())[0]}", "temperature": 1.0}
        await self._stream(client, "/v1/completions", {**body, "max_tokens": rng.randint(1, MOST_TOKENS)}, **more)

    async def _converse(self, client: httpx.AsyncClient, rng: random.Random, check: str) -> None:
        """The base model answers, and an aLoRA continues in the K/V of the conversation."""
        messages = [{"role": "user", "content": prompts(1, round(MOST_WORDS ** rng.random()), rng.random())[0]}]
        body = {"messages": messages, "max_tokens": rng.randint(1, MOST_TOKENS)}
        await self._stream(client, "/v1/chat/completions", {**body, "model": self._base})
        await self._stream(client, "/v1/chat/completions", {**body, "model": check}, alora={"on_missing": "append"})

    async def _stream(
        self,
        client: httpx.AsyncClient,
        path: str,
        body: Mapping[str, Any],
        *,
        leave_after: int | None = None,
        **more: Any,
    ) -> None:
        """Read a stream to its end, or leave after some lines. Raises Refused."""
        async with client.stream("POST", path, json={**body, **more, "stream": True}) as response:
            if response.status_code != 200:
                await response.aread()
                self._refuse(response)
                return
            count, last = 0, ""
            async for line in response.aiter_lines():
                if count == leave_after:
                    return
                count += 1
                last = line or last
                if line.startswith('data: {"error"'):
                    raise Refused(f"{path} for {body['model']}: {line}")
            if last != "data: [DONE]":
                raise Refused(f"{path} for {body['model']}: the stream ended with {last!r}")

    # Adapters

    async def _upload(self, client: httpx.AsyncClient, rng: random.Random, name: str) -> None:
        """A new adapter, one answer of it, and its end."""
        await self._put(client, name, self._files[rng.choice(RANKS)], ephemeral=rng.random() < 0.5)
        await self._complete(client, rng, name)
        await self._call(client, "DELETE", f"/adapters/{name}")

    async def _move(self, client: httpx.AsyncClient, rng: random.Random, name: str) -> None:
        """Pin and unpin an adapter, or load or unload it."""
        tier = rng.choice(["host", "device"])
        match rng.randrange(3):
            case 0:
                await self._call(client, "POST", f"/adapters/{name}/load", json={"tier": tier, "pin": True})
                await self._complete(client, rng, name)
                await self._call(client, "PATCH", f"/adapters/{name}", json={"pinned": False})
            case 1:
                await self._call(client, "POST", f"/adapters/{name}/load", json={"tier": tier})
            case _:
                await self._call(client, "POST", f"/adapters/{name}/unload", json={"tier": tier})

    async def _put(self, client: httpx.AsyncClient, name: str, file: bytearray, *, ephemeral: bool = False) -> None:
        number_file(file, next(self._numbers))  # so that its digest is new
        headers = {"Content-Type": "application/vnd.safetensors"}
        query = {"ephemeral": ephemeral}
        await self._call(client, "PUT", f"/adapters/{name}", content=bytes(file), params=query, headers=headers)

    async def _call(self, client: httpx.AsyncClient, method: str, path: str, **given: Any) -> httpx.Response:
        response = await client.request(method, path, **given)
        if response.is_error:
            self._refuse(response)
        return response

    def _refuse(self, response: httpx.Response) -> None:
        """Count a race. Raises Refused for any other error."""
        try:
            error = response.json()["error"]
            raced = error["code"] in RACES or (error["code"] == "adapter_failed" and BETWEEN_PINS in error["message"])
        except (json.JSONDecodeError, KeyError):
            raced = False
        if not raced:
            asked = f"{response.request.method} {response.request.url.path}"
            raise Refused(f"{asked}: {response.status_code} {response.text[:300]}")
        self.done["race"] += 1

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self._url, headers=bearer(self._api_key), timeout=120)
