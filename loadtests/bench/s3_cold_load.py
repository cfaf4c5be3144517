"""s3: milliseconds from S3 to the device with an empty cache, compared with the bare transfer of the same file.

The transfer is one GET by boto3. One server uploads the adapters; a second one with an empty cache is measured.
"""

import argparse
import shlex
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from loadtests.adapter_client import STAGES, AdapterClient, CallFailed
from loadtests.bench.adapter_copy import memory_bytes
from loadtests.bench.report import conditions, medians, say, table, verdict
from loadtests.bench.s3_endpoint import Endpoint, s3_endpoint
from loadtests.random_adapter import adapter_file, number_file
from loadtests.server_process import Model, running_server

DEFAULTS = {"adapters": 7, "ranks": [8, 16, 64]}
GOAL_SECONDS = 0.050  # more than the bare transfer


class Stored(NamedTuple):
    """An adapter in the bucket."""

    name: str
    key: str  # of its file
    bytes: int  # the file's size


def add_options(add: Any) -> None:
    add("--s3-endpoint", help="takes credentials from the environment; default: moto's server on loopback")
    add(
        "--s3-bucket",
        default="rootstock-bench",
        help="created if it does not exist; the run's objects are deleted",
    )


def run(chosen: argparse.Namespace, model: Model, scratch: Path) -> str:
    prefix = f"bench-{time.time_ns()}"
    room = str((1 + chosen.adapters * len(chosen.ranks)) * memory_bytes(model, max(chosen.ranks)) + 2**20)
    store = f"s3://{chosen.s3_bucket}/{prefix}"
    arguments = ["--model", str(model.directory), "--store", store, "--max-lora-rank", str(max(256, *chosen.ranks))]
    arguments += ["--adapter-bytes", room, "--host-adapter-bytes", room, *shlex.split(chosen.server_args)]
    try:
        with s3_endpoint(chosen.s3_endpoint) as endpoint:
            client = endpoint.client()
            make_bucket(client, chosen.s3_bucket)
            try:
                return measured(chosen, model, scratch, endpoint, arguments, prefix)
            finally:
                empty(client, chosen.s3_bucket, prefix)
    except (BotoCoreError, ClientError) as error:
        raise CallFailed(f"S3: {error}") from error


def measured(
    chosen: argparse.Namespace, model: Model, scratch: Path, endpoint: Endpoint, arguments: list[str], prefix: str
) -> str:
    say("starting the server that uploads")
    with running_server([*arguments, "--cache-directory", str(scratch / "one")], endpoint.environment) as url:
        stored = upload(url, endpoint.client(), chosen, model, prefix)
    say("starting the server that is measured")
    with ExitStack() as stack:
        cold = [*arguments, "--cache-directory", str(scratch / "two")]
        url = stack.enter_context(running_server(cold, endpoint.environment))
        server = stack.enter_context(AdapterClient(url))
        bare = endpoint.client()
        rows = []
        for rank, adapters in stored.items():
            say(f"measuring {len(adapters)} adapter(s) of rank {rank or min(chosen.ranks)}")
            figures = [one_adapter(server, bare, chosen.s3_bucket, it, number) for number, it in enumerate(adapters)]
            if rank is not None:
                rows.append(row(rank, adapters, figures))
        kind = "moto's server on loopback" if chosen.s3_endpoint is None else chosen.s3_endpoint
        stated = conditions(
            model,
            url,
            f"S3: {kind}; another server wrote every object, and the cache directory was empty.",
            f"Rounds: {chosen.adapters} random adapters of each rank, all seven projections, each loaded once, with "
            "wait, and transferred once by a GET of its file, the two in alternating order, after one load to warm up; "
            "medians, and the difference is the median of the differences. Stages of a load may overlap.",
        )
    return f"{table(head(), rows)}\n\n{stated}"


def upload(
    url: str, client: Any, chosen: argparse.Namespace, model: Model, prefix: str
) -> dict[int | None, list[Stored]]:
    """Upload the adapters of each rank, and one to warm up with, under the key None. Raises CallFailed."""
    stored: dict[int | None, list[Stored]] = {}
    number = 0
    with AdapterClient(url) as server:
        for rank, count in [(None, 1), *((rank, chosen.adapters) for rank in chosen.ranks)]:
            say(f"uploading {count} adapter(s) of rank {rank or min(chosen.ranks)}")
            file = adapter_file(model.config, 0, rank or min(chosen.ranks))
            stored[rank] = []
            for _ in range(count):
                number += 1
                number_file(file, number)
                digest = server.put(f"bench-{number}", file, preload=False)["digest"]
                stored[rank].append(find(client, chosen.s3_bucket, prefix, f"bench-{number}", digest))
    return stored


def find(client: Any, bucket: str, prefix: str, name: str, digest: str) -> Stored:
    """Return the adapter whose object has a digest in its key. Raises CallFailed."""
    for found in objects(client, bucket, prefix):
        if digest in found["Key"]:
            return Stored(name, found["Key"], found["Size"])
    raise CallFailed(f"no object below {bucket}/{prefix} has the digest {digest} in its key")


def objects(client: Any, bucket: str, prefix: str) -> list[dict[str, Any]]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    return [found for page in pages for found in page.get("Contents", ())]


def one_adapter(server: AdapterClient, client: Any, bucket: str, adapter: Stored, number: int) -> list[float]:
    """Return the seconds of the bare transfer, of the cold load, of the difference, and of each stage of the load.

    The transfer is first for an even `number`, the load for an odd one.
    """
    if number % 2:
        load, stages = cold_load(server, adapter)
        bare = transfer_seconds(client, bucket, adapter)
    else:
        bare = transfer_seconds(client, bucket, adapter)
        load, stages = cold_load(server, adapter)
    return [bare, load, load - bare, *stages]


def transfer_seconds(client: Any, bucket: str, adapter: Stored) -> float:
    start = time.perf_counter()
    with client.get_object(Bucket=bucket, Key=adapter.key)["Body"] as body:
        content = body.read()
    seconds = time.perf_counter() - start
    if len(content) != adapter.bytes:
        raise CallFailed(f"{adapter.key}: received {len(content)} bytes of {adapter.bytes}")
    return seconds


def cold_load(server: AdapterClient, adapter: Stored) -> tuple[float, list[float]]:
    """Return the seconds of the call and of each stage. Raises CallFailed if a stage was skipped."""
    before = server.metrics()
    start = time.perf_counter()
    server.load(adapter.name, "device")
    seconds = time.perf_counter() - start
    stages = server.metrics().load_stages(before)
    if any(stages.get(stage, (0.0, 0))[1] < 1 for stage in STAGES):
        raise CallFailed(f"{adapter.name}: expected all stages of a cold load, found {stages}")
    return seconds, [stages[stage][0] for stage in STAGES]


def head() -> list[str]:
    goal = f"more than the transfer, ms (goal ≤ {1000 * GOAL_SECONDS:.0f})"
    return ["rank", "MB", "bare transfer, ms", "cold load, ms", goal, *(f"{stage}, ms" for stage in STAGES)]


def row(rank: int, adapters: list[Stored], figures: list[list[float]]) -> list[str]:
    bare, load, more, *stages = medians(figures)
    shown = verdict(f"{1000 * more:+.0f}", met=more <= GOAL_SECONDS)
    cells = [f"{1000 * bare:.0f}", f"{1000 * load:.0f}", shown, *(f"{1000 * stage:.1f}" for stage in stages)]
    return [str(rank), f"{adapters[0].bytes / 1e6:.2f}", *cells]


def make_bucket(client: Any, bucket: str) -> None:
    if all(found["Name"] != bucket for found in client.list_buckets()["Buckets"]):
        client.create_bucket(Bucket=bucket)


def empty(client: Any, bucket: str, prefix: str) -> None:
    """Delete the run's objects from the bucket."""
    for found in objects(client, bucket, prefix):
        client.delete_object(Bucket=bucket, Key=found["Key"])
