"""Locust users who chat with adapters, some of them far more popular than others.

An aLoRA adapter answers a chat with its invocation in place of the assistant's header, where the chat has none itself.

`locust -f loadtests/locustfile.py --headless --users 8 --run-time 60s --host http://127.0.0.1:8000`. Beside the
requests, two entries are recorded for each model: "first token" is the time to the first token, "per token" the mean
time of each later token, both in milliseconds. --popularity is Zipf's exponent: 0 makes all models equally popular.
--timings writes each single entry to a file, for the report of `python -m loadtests.load`.
"""

import itertools
import json
import random
import time
from argparse import ArgumentParser
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import gevent
import httpx
from locust import HttpUser, between, events, task
from locust.env import Environment
from locust.exception import StopUser

TOPICS = ("a lantern", "the sea", "an old market", "the number seven", "a silver engine", "winter", "copper", "bridges")
FIRST_TOKEN, PER_TOKEN = "first token", "per token"  # the kinds of entries besides HTTP's methods
VERBS = ("Describe", "Explain", "Praise", "Compare two kinds of", "Write a line about", "Ask me about")


def add_options(parser: ArgumentParser, **_: Any) -> None:
    options: list[tuple[str, str, type, Any, str]] = [
        ("--models", "LOAD_MODELS", str, "", "names, the most popular first, separated by commas; default: all served"),
        ("--popularity", "LOAD_POPULARITY", float, 1.0, "Zipf exponent of the models' popularity"),
        ("--requests", "LOAD_REQUESTS", int, 0, "end the run after this many requests; 0: no limit"),
        ("--seconds", "LOAD_SECONDS", float, 0.0, "end the run so long after its first answer; 0: no limit"),
        ("--max-tokens", "LOAD_MAX_TOKENS", int, 32, "tokens of an answer"),
        ("--api-key", "LOAD_API_KEY", str, "", "sent as a bearer token"),
        ("--seed", "LOAD_SEED", int, 0, "of the users' choices"),
        ("--timings", "LOAD_TIMINGS", str, "", "file to append each entry to, one JSON object a line"),
    ]
    for flag, variable, kind, default, text in options:
        parser.add_argument(flag, env_var=variable, type=kind, default=default, help=text)


def end_after_requests(environment: Environment, **_: Any) -> None:
    numbers = itertools.count(1)
    options, hooks = vars(environment.parsed_options), cast(Any, environment.events)

    def count(request_type: str, **_: Any) -> None:
        if request_type in ("GET", "POST") and next(numbers) == options["requests"] and environment.runner:
            gevent.spawn(environment.runner.quit)  # it kills this user's greenlet, and must not run in it

    hooks.request.add_listener(count)


def end_after_seconds(environment: Environment, **_: Any) -> None:
    """Locust's own --run-time also counts what users do before their first request, which a busy machine drags out."""
    options, hooks = vars(environment.parsed_options), cast(Any, environment.events)
    answers = itertools.count(1)

    def count(request_type: str, **_: Any) -> None:
        if request_type == "POST" and next(answers) == 1 and options["seconds"] and environment.runner:
            gevent.spawn_later(options["seconds"], environment.runner.quit)

    hooks.request.add_listener(count)


def write_timings(environment: Environment, **_: Any) -> None:
    path, hooks = vars(environment.parsed_options)["timings"], cast(Any, environment.events)
    if not path:
        return
    file = open(path, "a")  # noqa: SIM115 - until this process ends

    def write(request_type: str, name: str, response_time: float, response_length: int, **more: Any) -> None:
        entry = {"at": time.time(), "kind": request_type, "name": name, "ms": response_time}
        entry |= {"tokens": response_length} if request_type == PER_TOKEN else {}
        entry |= {"failed": str(more["exception"])} if more.get("exception") else {}
        file.write(json.dumps(entry) + "\n")

    hooks.request.add_listener(write)
    hooks.quitting.add_listener(lambda **_: file.close())


HOOKS: Any = events  # Locust's have no types
HOOKS.init_command_line_parser.add_listener(add_options)
HOOKS.init.add_listener(end_after_requests)
HOOKS.init.add_listener(end_after_seconds)
HOOKS.init.add_listener(write_timings)


def zipf_weights(count: int, exponent: float) -> list[float]:
    """Return the weights by which each of `count` models is chosen, by rank."""
    return [1 / rank**exponent for rank in range(1, count + 1)]


class StreamBroken(Exception):
    """A stream contained an error, or was cut off."""


class Answer(NamedTuple):
    """A streamed chat answer."""

    arrivals: list[float]  # time.perf_counter() at each piece of text; empty if the model ended at once
    text: str
    usage: dict[str, Any]  # token counts, as the server sends them


class StreamingUser(HttpUser):
    """Has its own random numbers and the API key, and records its chats as the module's docstring says."""

    abstract = True
    wait_time = between(0, 0.1)
    numbers = itertools.count()

    def on_start(self) -> None:
        settings = self.environment.parsed_options
        self.random = random.Random(f"{settings.seed}/{next(self.numbers)}")
        if settings.api_key:
            self.client.headers["Authorization"] = f"Bearer {settings.api_key}"

    def served_models(self) -> list[dict[str, Any]]:
        """Return every model that the server lists. If it lists none, record a failure and stop this user."""
        with self.client.get("/v1/models", catch_response=True) as response:
            if response.ok and (cards := list[dict[str, Any]](response.json()["data"])):
                return cards
            response.failure(f"no models: {response.status_code} {response.text[:200]}")
        raise StopUser

    def activated(self) -> set[str]:
        """Return the names of the aLoRA adapters, by a request that no statistic counts; none from another server."""
        headers = {name: value for name, value in self.client.headers.items() if name == "Authorization"}
        response = httpx.get(f"{self.host}/adapters", headers=headers, timeout=60)
        return (
            {each["name"] for each in response.json()["adapters"] if is_alora(each)} if response.is_success else set()
        )

    def question(self) -> list[dict[str, str]]:
        """The messages of a new chat, unlike all others."""
        text = f"{self.random.choice(VERBS)} {self.random.choice(TOPICS)}, {self.random.randrange(10**6)}."
        return [{"role": "user", "content": text}]

    def stream(
        self, model: str, messages: list[dict[str, str]], max_tokens: int, *, name: str | None = None, **more: Any
    ) -> Answer | None:
        """Return the answer to a chat; None for a request that failed, after recording the failure.

        The entries have the model's name, or another one.
        """
        name = name or model
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, **more}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        start = time.perf_counter()
        request = self.client.post("/v1/chat/completions", json=body, stream=True, catch_response=True, name=name)
        with request as response:
            if not response.ok:
                response.failure(f"{response.status_code} {response.text[:200]}")
                return None
            try:
                answer = read_stream(response.iter_lines(chunk_size=None))
            except StreamBroken as error:
                response.failure(str(error))
                return None
        arrivals, tokens = answer.arrivals, answer.usage["completion_tokens"]
        if arrivals:
            record(self.environment, FIRST_TOKEN, name, arrivals[0] - start)
        if len(arrivals) > 1 and tokens > 1:
            record(self.environment, PER_TOKEN, name, (arrivals[-1] - arrivals[0]) / (tokens - 1), tokens)
        return answer


class ChatUser(StreamingUser):
    def on_start(self) -> None:
        super().on_start()
        settings = self.environment.parsed_options
        named = settings.models.split(",") if settings.models else []
        self.models = named or [card["id"] for card in self.served_models()]
        self.weights = zipf_weights(len(self.models), settings.popularity)
        self.invoked = self.activated()

    @task
    def chat(self) -> None:
        model = self.random.choices(self.models, self.weights)[0]
        more: dict[str, Any] = {"alora": {"on_missing": "append"}} if model in self.invoked else {}
        self.stream(model, self.question(), self.environment.parsed_options.max_tokens, **more)


def is_alora(adapter: dict[str, Any]) -> bool:
    return bool(adapter["kind"] == "alora")


def read_stream(lines: Iterable[bytes]) -> Answer:
    """Read a stream of server-sent events to its end. Raises StreamBroken."""
    arrivals: list[float] = []
    text, usage = "", None
    for line in lines:
        if line == b"data: [DONE]":
            if usage is None:
                raise StreamBroken("the stream had no usage")
            return Answer(arrivals, text, usage)
        if line.startswith(b"data: "):
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise StreamBroken(event["error"]["message"])
            if piece := "".join(choice["delta"].get("content") or "" for choice in event["choices"]):
                arrivals.append(time.perf_counter())
                text += piece
            usage = event.get("usage") or usage
    raise StreamBroken("the stream ended without [DONE]")


def record(environment: Environment, kind: str, model: str, seconds: float, tokens: int = 0) -> None:
    """Record an entry; that of an answer's time for each token has the number of its tokens as its length."""
    hooks: Any = environment.events
    hooks.request.fire(
        request_type=kind, name=model, response_time=1000 * seconds, response_length=tokens, exception=None, context={}
    )
