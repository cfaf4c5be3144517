"""Locust users who each talk with the base model and have aLoRA adapters check the conversation after every turn.

`locust -f loadtests/locust_pipeline.py --headless --users 8 --run-time 60s --host http://127.0.0.1:8000`, with aLoRA
adapters on the server. The options are those of loadtests/locustfile.py and --turns; --models names the checks
(default: all aLoRA adapters on the server). Besides that file's entries, "cached percent" is recorded for each model:
not a time, but the share of a prompt that was in the server's prefix cache.
"""

from typing import Any

from locust import task
from locust.exception import StopUser

from loadtests.completion_stream import cached_tokens
from loadtests.locustfile import HOOKS, Answer, StreamingUser, is_alora, record


def add_turns(parser: Any, **_: Any) -> None:
    parser.add_argument("--turns", env_var="LOAD_TURNS", type=int, default=6, help="of each conversation")


HOOKS.init_command_line_parser.add_listener(add_turns)


class PipelineUser(StreamingUser):
    """Runs one step of the pipeline after the other: a turn of the conversation and its checks."""

    def on_start(self) -> None:
        super().on_start()
        settings = self.environment.parsed_options
        self.checks = settings.models.split(",") if settings.models else self.served_checks()
        self.base = next(card["id"] for card in self.served_models() if not card["parent"])
        self.messages: list[dict[str, str]] = []

    def served_checks(self) -> list[str]:
        """Return the names of all aLoRA adapters on the server. If there are none, record a failure and stop."""
        with self.client.get("/adapters", catch_response=True) as response:
            if response.ok and (names := [each["name"] for each in response.json()["adapters"] if is_alora(each)]):
                return names
            response.failure(f"no aLoRA adapters: {response.status_code} {response.text[:200]}")
        raise StopUser

    @task
    def turn(self) -> None:
        settings = self.environment.parsed_options
        if len(self.messages) >= 2 * settings.turns:
            self.messages = []
        asked = [*self.messages, *self.question()]
        answer = self.stream(self.base, asked, settings.max_tokens)
        if answer is None:
            return
        self.record_cached(self.base, answer)
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        for check in self.checks:
            found = self.stream(check, self.messages, settings.max_tokens, alora={"on_missing": "append"})
            if found is not None:
                self.record_cached(check, found)

    def record_cached(self, model: str, answer: Answer) -> None:
        percent = 100 * cached_tokens(answer.usage) / answer.usage["prompt_tokens"]
        record(self.environment, "cached percent", model, percent / 1000)  # record() multiplies by 1000
