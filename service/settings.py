"""What the service is started with: the only reader of the command line and of the environment."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import msgspec

from runtime.config import MIB, EngineConfig

UNITS = {"": 1, "K": 1024, "M": MIB, "G": 1024 * MIB}
ENGINE = EngineConfig(model="")  # the engine's own defaults, so that they are written in one place


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the service is started with; frozen, and handed to whoever needs a part of it.

    `engine.model` is the model's directory; `served_name` is how clients name the base model. `file_roots` are the
    directories below which `file://` sources may lie; none are allowed by default. With `api_key` set, every call but
    health and metrics must carry it. `data_directory` holds what uploads leave behind. `engine_command` starts an
    engine process; the endpoint to connect to is appended to it.
    """

    engine: EngineConfig
    served_name: str
    data_directory: Path
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    file_roots: tuple[Path, ...] = ()
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
        for name in ("max_upload_bytes", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for root in self.file_roots:
            if not root.is_dir():
                raise ValueError(f"the file root {root} is not a directory")


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
            host=given["host"],
            port=given["port"],
            api_key=given["api_key"],
            file_roots=tuple(root.resolve() for root in given["file_roots"]),
            max_upload_bytes=given["max_upload_bytes"],
            max_body_bytes=given["max_body_bytes"],
        )


def read(argv: Sequence[str], environment: Mapping[str, str]) -> Arguments:
    """Parse the command line; HOST, PORT, MODEL and ROOTSTOCK_API_KEY of the environment are its defaults.

    A bad value ends the program with a sentence on standard error and status 2.
    """
    options = parser(environment).parse_args(argv)
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rootstock"
    return Arguments(options=options, cache_directory=cache)


def parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    data = Path(environment.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "rootstock"
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
    add("--data-directory", type=Path, default=data, help="where uploads are kept")
    add("--api-key", default=environment.get("ROOTSTOCK_API_KEY") or None, help="guards all but health and metrics")
    add("--file-root", dest="file_roots", type=Path, action="append", default=[], help="allow file:// below it")
    add("--max-upload-bytes", type=size, default="2G", help="of one adapter")
    add("--max-body-bytes", type=size, default="16M", help="of one JSON body")
    add_engine_options(arguments)
    return arguments


def add_engine_options(arguments: argparse.ArgumentParser) -> None:
    add = arguments.add_argument_group("engine").add_argument
    kinds = EngineConfig.__annotations__
    add("--dtype", choices=get_args(kinds["dtype"]), default=ENGINE.dtype)
    add("--load-format", choices=get_args(kinds["load_format"]), default=ENGINE.load_format)
    add("--max-model-len", type=count, help="tokens of prompt and answer together; default: the model's own limit")
    add("--kv-cache-bytes", type=size, default=ENGINE.kv_cache_bytes)
    add("--no-prefix-cache", dest="prefix_cache", action="store_false", default=ENGINE.prefix_cache)
    add("--max-running", type=count, default=ENGINE.max_running, help="sequences in one batch")
    add("--max-waiting", type=count, default=ENGINE.max_waiting, help="sequences queued before clients get 429")
    add("--max-batch-tokens", type=count, default=ENGINE.max_batch_tokens, help="tokens computed in one step")
    add("--adapter-bytes", type=size, default=ENGINE.adapter_bytes, help="device memory for adapters")
    add("--max-lora-rank", type=count, default=ENGINE.max_lora_rank)
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


def size(text: str) -> int:
    """Bytes, as a number with an optional K, M or G (powers of 1024)."""
    found = re.fullmatch(r"([0-9]{1,18})([KMG]?)", text.upper())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 1048576, 512M or 2G")
    return int(found[1]) * UNITS[found[2]]
