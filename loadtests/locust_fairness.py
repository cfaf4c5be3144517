"""Locust users who ask one thing after another, beside a flood of requests that must not starve them.

`locust -f loadtests/locust_fairness.py --headless --users 68 --others 4 --run-time 60s --models a,b,c --host
http://127.0.0.1:8000`. The options are those of loadtests/locustfile.py, --others, --flood and --flood-api-key. All
users beyond the others are the flood, whose entries have the name "flood". With `--flood tenant` it is one tenant, and
asks the same models as the others, of whom each is a tenant too: by cache_salt, or by its key where the flood has one
of its own. With `--flood adapter` all are one tenant; the flood asks the first model, the others the other ones.
"""

import argparse
from typing import Any

from locust import constant, task
from locust.env import Environment

from loadtests.api_key import FLOOD_VARIABLE
from loadtests.load.runs import FLOOD
from loadtests.locustfile import HOOKS, StreamingUser


def add_flood(parser: argparse.ArgumentParser, **_: Any) -> None:
    options: Any = parser  # Locust's parser reads variables too, which argparse's has no types for
    add = options.add_argument
    add("--others", env_var="LOAD_OTHERS", type=int, default=4, help="users beside the flood")
    add("--flood", env_var="LOAD_FLOOD", choices=("tenant", "adapter"), default="tenant", help="what has many requests")
    add("--flood-api-key", env_var=FLOOD_VARIABLE, default="", help="of the flood, where tenants are keys")


def place_others(environment: Environment, **_: Any) -> None:
    OtherUser.fixed_count = vars(environment.parsed_options)["others"]


HOOKS.init_command_line_parser.add_listener(add_flood)
HOOKS.init.add_listener(place_others)


class TenantUser(StreamingUser):
    """Asks one of its models; the answers have their full length, so that all requests cost the same."""

    abstract = True
    entries: str | None = None  # the name of its entries; None: the model's

    def on_start(self) -> None:
        super().on_start()
        settings = self.environment.parsed_options
        self.models = settings.models.split(",") if settings.models else [card["id"] for card in self.served_models()]
        self.tenant = ""

    @task
    def chat(self) -> None:
        tokens = self.environment.parsed_options.max_tokens
        more = {"cache_salt": self.tenant} if self.tenant else {}
        model = self.random.choice(self.models)
        self.stream(model, self.question(), tokens, name=self.entries, ignore_eos=True, **more)


class OtherUser(TenantUser):
    """One of those who must not be starved."""

    def on_start(self) -> None:
        super().on_start()
        if self.environment.parsed_options.flood == "tenant":
            self.tenant = f"other-{next(self.numbers)}"
        else:
            self.models = self.models[1:] or self.models


class FloodUser(TenantUser):
    """One of the many requests of one tenant, or of one adapter."""

    entries = FLOOD
    wait_time = constant(0)

    def on_start(self) -> None:
        super().on_start()
        settings = self.environment.parsed_options
        if settings.flood == "tenant":
            self.tenant = FLOOD
        else:
            self.models = self.models[:1]
        if settings.flood_api_key:
            self.client.headers["Authorization"] = f"Bearer {settings.flood_api_key}"
