"""What the service is started with: the only reader of the command line and of the environment."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import msgspec

from runtime.config import MIB, EngineConfig
from service.source_urls import AllowedSources, store_of

UNITS = {"": 1, "K": 1024, "M": MIB, "G": 1024 * MIB}
ENGINE = EngineConfig(model="")  # the engine's own defaults, so that they are written in one place


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the service is started with; frozen, and handed to whoever needs a part of it.

    `engine.model` is the model's directory; `served_name` is how clients name the base model. `store` is an s3:// URL
    where adapters are kept, with files of them in `cache_directory`; without one they are kept in `data_directory`.
    `refresh_seconds` is how often the store is asked what other servers changed, `collect_after_seconds` how old bytes
    without a name must be to be collected. `allowed_sources` are the URLs below which adapters may be fetched from;
    none by default. `max_uploads` bounds the uploads and imports at one time. With `api_key` set, every call but
    health and metrics must carry it. `engine_command` starts an engine process; the endpoint to connect to is
    appended to it.
    """

    engine: EngineConfig
    served_name: str
    data_directory: Path
    cache_directory: Path
    store: str | None = None
    disk_cache_bytes: int = 8192 * MIB
    refresh_seconds: float = 2.0
    collect_after_seconds: float = 900.0
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allowed_sources: tuple[str, ...] = ()
    max_uploads: int = 8
    max_upload_bytes: int = 2 * 1024 * MIB
    max_body_bytes: int = 16 * MIB
    engine_command: tuple[str, ...] = (sys.executable, "-m", "runtime.process")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, not {self.port}")
        if not self.served_name or any(character in self.served_name for character in "@:"):
            raise ValueError(f"the served name must not be empty or contain '@' or ':', not {self.served_name!r}")
        if self.api_key == "":
            raise ValueError("the API key must not be empty")
        for name in ("disk_cache_bytes", "max_uploads", "max_upload_bytes", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.refresh_seconds <= 0:
            raise ValueError(f"refresh_seconds must be more than 0, not {self.refresh_seconds:g}")
        if self.collect_after_seconds < 60:
            raise ValueError(
                f"collect_after_seconds must be at least 60, not {self.collect_after_seconds:g}: "
                "an upload's name may be on its way"
            )
        AllowedSources(self.allowed_sources)
        if self.store is not None:
            store_of(self.store)


class Arguments(msgspec.Struct, frozen=True, kw_only=True):
    """The command line as given: what `Settings` are made of once the model's directory is known."""

    options: argparse.Namespace
    cache_directory: Path

    @property
    def model(self) -> str | None:
        """A directory, a hub id, or None for the embedded model."""
        return self.options.model

    def settings(self, model_directory: Path, name: str) -> Settings:
        """The settings for a model that lies in a directory. Raises ValueError with a sentence."""
        given = vars(self.options)
        engine = {field: given[field] for field in EngineConfig.__struct_fields__ if field in given}
        return Settings(
            engine=EngineConfig(**{**engine, "model": str(model_directory)}),
            served_name=given["served_name"] or name,
            data_directory=given["data_directory"],
            cache_directory=given["cache_directory"],
            store=given["store"],
            disk_cache_bytes=given["disk_cache_bytes"],
            refresh_seconds=given["refresh_seconds"],
            collect_after_seconds=given["collect_after_seconds"],
            host=given["host"],
            port=given["port"],
            api_key=given["api_key"],
            allowed_sources=tuple(given["allowed_sources"]),
            max_uploads=given["max_uploads"],
            max_upload_bytes=given["max_upload_bytes"],
            max_body_bytes=given["max_body_bytes"],
        )


def read(argv: Sequence[str], environment: Mapping[str, str]) -> Arguments:
    """Parse the command line; HOST, PORT, MODEL, ROOTSTOCK_STORE and ROOTSTOCK_API_KEY are its defaults.

    A bad value ends the program with a sentence on standard error and status 2.
    """
    options = parser(environment).parse_args(argv)
    return Arguments(options=options, cache_directory=user_cache(environment))


def user_cache(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rootstock"


def parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="python -m service",
        description="Serve one base model and any number of LoRA adapters grafted on at request.",
    )
    add = arguments.add_argument
    # argparse converts a default that is a string as if it had been typed, so the environment gets the same checks
    add("--host", default=environment.get("HOST") or "127.0.0.1", help="address to listen on (HOST)")
    add("--port", type=port, default=environment.get("PORT") or "8000", help="0 picks a free one (PORT)")
    add("--model", default=environment.get("MODEL") or None, help="directory or hub id (MODEL); default: embedded")
    add("--served-name", help="what clients call the base model; default: the model's own name")
    add("--api-key", default=environment.get("ROOTSTOCK_API_KEY") or None, help="guards all but health and metrics")
    add("--max-upload-bytes", type=size, default="2G", help="of one adapter")
    add("--max-body-bytes", type=size, default="16M", help="of one JSON body")
    add_store_location(arguments, environment)
    add_adapter_options(arguments, environment)
    add_engine_options(arguments)
    return arguments


def add_store_location(arguments: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Where a service's adapters are kept."""
    add = arguments.add_argument_group("store").add_argument
    add(
        "--store",
        type=store,
        metavar="URL",
        default=environment.get("ROOTSTOCK_STORE") or None,
        help="s3://bucket[/prefix] where adapters are kept (ROOTSTOCK_STORE); default: the data directory",
    )
    data = Path(environment.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "rootstock"
    add("--data-directory", type=Path, default=data, help="where adapters are kept, unless --store says so")


def add_adapter_options(arguments: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    add = arguments.add_argument_group("adapters").add_argument
    cache = user_cache(environment) / "adapters"
    add("--cache-directory", type=Path, default=cache, help="files of the adapters in a remote store")
    add("--disk-cache-bytes", type=size, default="8G", help="what the cache directory may hold")
    add("--refresh-seconds", type=seconds, default="2", help="between looks at what others changed in the store")
    add("--collect-after-seconds", type=seconds, default="900", help="age of bytes without a name to be collected")
    add(
        "--allow-source",
        dest="allowed_sources",
        metavar="URL",
        action="append",
        default=[],
        help="allow adapters from below it: s3://bucket, hf://org, file:///path; may be given several times",
    )
    add("--max-uploads", type=count, default="8", help="uploads and imports at one time")


def add_engine_options(arguments: argparse.ArgumentParser) -> None:
    add = arguments.add_argument_group("engine").add_argument
    kinds = EngineConfig.__annotations__
    add("--dtype", choices=get_args(kinds["dtype"]), default=ENGINE.dtype)
    add("--load-format", choices=get_args(kinds["load_format"]), default=ENGINE.load_format)
    add("--max-model-len", type=count, help="tokens of prompt and answer together; default: the model's own limit")
    add("--kv-cache-bytes", type=size, default=ENGINE.kv_cache_bytes)
    add("--host-kv-bytes", type=size, default=ENGINE.host_kv_bytes, help="host memory for evicted KV; default: none")
    add("--no-prefix-cache", dest="prefix_cache", action="store_false", default=ENGINE.prefix_cache)
    add("--max-running", type=count, default=ENGINE.max_running, help="sequences in one batch")
    add("--max-waiting", type=count, default=ENGINE.max_waiting, help="sequences queued before clients get 429")
    add("--max-batch-tokens", type=count, default=ENGINE.max_batch_tokens, help="tokens computed in one step")
    add("--adapter-bytes", type=size, default=ENGINE.adapter_bytes, help="device memory for adapters")
    add("--host-adapter-bytes", type=size, default=ENGINE.host_adapter_bytes, help="host memory for adapters")
    add("--max-lora-rank", type=count, default=ENGINE.max_lora_rank)
    add(
        "--device", choices=get_args(kinds["device"]), default=ENGINE.device, help="auto: a CUDA device if there is one"
    )
    add("--kernels", choices=get_args(kinds["kernels"]), default=ENGINE.kernels, help="auto: triton on a CUDA device")
    add("--no-cuda-graphs", dest="cuda_graphs", action="store_false", default=ENGINE.cuda_graphs)
    add("--no-overlap", dest="overlap", action="store_false", default=ENGINE.overlap, help="of steps on a GPU")
    add("--threads", type=count, help="of the engine; default: one a core")


def port(text: str) -> int:
    value = count(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 65535")
    return value


def count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds such as 2 or 0.5")
    return float(text)


def store(text: str) -> str:
    try:
        return store_of(text).url
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def size(text: str) -> int:
    """Bytes, as a number with an optional K, M or G (powers of 1024)."""
    found = re.fullmatch(r"([0-9]{1,18})([KMG]?)", text.upper())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 1048576, 512M or 2G")
    return int(found[1]) * UNITS[found[2]]
