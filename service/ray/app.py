"""Rootstock on Ray Serve: `serve run service.ray.app:app replicas=2 model=… store=…`, or `build` in a program.

Replicas on one store, each with an engine of its own, behind an ingress that knows where adapters are: docs/ray.md.
"""

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig

from runtime.config import CPU_SIZES
from service.configure import settings_for
from service.ray.ingress import Ingress
from service.ray.replica import Replica
from service.ray.router import ResidencyRouter
from service.routing.scaling import servers_wanted

STATS_SECONDS = 0.5  # between two words of a replica to the routers
ONGOING = 4096  # requests of a replica, beyond which Ray asks another one: the service has limits of its own
LOOK_BACK_SECONDS = 11.0  # of the past, that scaling goes by: Ray wants more than the 10 s between two reports
END_SECONDS = 15.0  # after --drain-seconds, for an engine to end
HEALTH_SECONDS = 1.0  # between two checks, after which a replica that has died is replaced
HEALTH_TIMEOUT_SECONDS = 10.0  # of a check; a replica that misses three in a row is replaced
# One replica cannot know what another one has in memory, and two cannot bind one address
REFUSED = ("kv_events", "kv_events_replay", "config", "host", "port")
DEFAULTS = {"routing_prefixes": True, "responses_store_bytes": 0}


class Deployment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many replicas there are, and what each of them takes."""

    replicas: int = 2
    max_replicas: int = 0  # more than `replicas`: as many as the time that requests wait asks for
    ingresses: int = 1
    cpus: float = 1.0  # that Ray counts for a replica
    gpus: float = 0.0
    upscale_seconds: float = 10.0  # that requests have waited for too long before a replica is added
    downscale_seconds: float = 300.0


def app(args: dict[str, Any]) -> serve.Application:
    """The application of `serve run` and of a Serve config: values are as in a TOML file, texts need no quotes."""
    return build({name: _value(given) if isinstance(given, str) else given for name, given in args.items()})


def build(options: Mapping[str, Any], engine_command: Sequence[str] | None = None) -> serve.Application:
    """The application, from the fields of `Deployment` and the options of `service.configure.settings_for`.

    `engine_command` is for tests. Raises ValueError with a sentence.
    """
    fields = Deployment.__struct_fields__
    try:
        own = msgspec.convert({name: options[name] for name in options if name in fields}, Deployment)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    given = {**DEFAULTS, **{name: value for name, value in options.items() if name not in fields}}
    if refused := [name for name in REFUSED if given.get(name) is not None]:
        raise ValueError(f"{refused[0]} cannot be set for several replicas: leave it out (docs/ray.md)")
    settings = settings_for(**given)
    end_seconds = settings.drain_seconds + END_SECONDS
    replica = serve.deployment(
        Replica,
        name="rootstock",
        max_ongoing_requests=ONGOING,
        graceful_shutdown_timeout_s=end_seconds,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=HEALTH_TIMEOUT_SECONDS,
        ray_actor_options={"num_cpus": own.cpus, "num_gpus": own.gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=ResidencyRouter,
            request_router_kwargs={"places": settings.engine.sizes(CPU_SIZES).max_running},
            request_routing_stats_period_s=STATS_SECONDS,
            request_routing_stats_timeout_s=5,
        ),
        **_size(own),
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        num_replicas=own.ingresses,
        max_ongoing_requests=ONGOING,
        graceful_shutdown_timeout_s=end_seconds,  # its streams are the replicas'
        ray_actor_options={"num_cpus": 0},
    )
    command = None if engine_command is None else tuple(engine_command)
    return ingress.bind(replica.bind(dict(given), command), settings.served_name, settings.max_body_bytes)


def scale(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Ray's autoscaling policy: by the time that requests wait."""
    metrics = context.aggregated_metrics or {}
    queues, loads = (list(metrics.get(name, {}).values()) for name in ("queue_seconds", "load"))
    return servers_wanted(context.current_num_replicas, queues, loads), {}


def _size(own: Deployment) -> dict[str, Any]:
    if own.max_replicas <= own.replicas:
        return {"num_replicas": own.replicas}
    scaling = AutoscalingConfig(
        min_replicas=own.replicas,
        max_replicas=own.max_replicas,
        upscale_delay_s=own.upscale_seconds,
        downscale_delay_s=own.downscale_seconds,
        look_back_period_s=max(LOOK_BACK_SECONDS, own.upscale_seconds),
        policy=AutoscalingPolicy(policy_function=scale),
    )
    return {"autoscaling_config": scaling}


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
