"""The settings of the service: each is declared once, at its field, as an option with a variable."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from runtime.config import MIB, EngineConfig, LogFormat, LogLevel, Option, check_bounds
from service.catalog.record import OnMissing
from service.kv import endpoints
from service.options import table
from service.options.config_file import read_file, read_values
from service.options.parser import AbsentOption, Declared, Given, Parser, PrintTable, Source, declared
from service.source_urls import AllowedSources, store_of
from service.text.chat_templates import template_text
from service.text.reasoning import ReasoningFamily
from service.tool_calls.syntax import Family

KEY = re.compile(r"[!-~]([ -~]*[!-~])?")
ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/,\s]+")
HTTP_URL = re.compile(r"https?://[^/\s]+(/\S*)?")
# Where programs, libraries, caches and compilers are; how libraries compute, use memory, and speak
CHILD_VARIABLE = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|TZ|TMPDIR|TEMP|TMP|VIRTUAL_ENV|CONDA_PREFIX|CC|CXX|CPATH|LIBRARY_PATH"
    r"|(?:LC|LD|DYLD|XDG|PYTHON|CUDA|CUBLAS|NVIDIA|NVRTC|NCCL|TRITON|TORCH|TORCHINDUCTOR|PYTORCH|OMP|GOMP|KMP|MKL|DNNL"
    r"|ONEDNN|OPENBLAS|BLIS|NUMEXPR|MALLOC|GLIBC|RAYON|RUST|TOKENIZERS|SAFETENSORS|TRANSFORMERS|HF)(?:_\w+)?|PYTHON\w+"
)
SECRET_WORD = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD|PASS|CREDENTIALS?)(?:_|$)")  # HF_TOKEN, say
ABSENT_OPTIONS = {
    "--enable-lora": "LoRA is always enabled: leave this option out",
    "--allowed-origins": "use --cors-origins, once for each origin",
    "--max-loras": "device memory for adapters is counted in bytes, not in adapters: use --adapter-bytes",
    "--max-cpu-loras": "host memory for adapters is counted in bytes, not in adapters: use --host-adapter-bytes",
}


def store_url(text: str) -> str:
    """The normal form of a store's URL. Raises ValueError with a sentence."""
    try:
        return store_of(text).url
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None


def http_url(text: str) -> str:
    """A URL without a slash at its end. Raises ValueError with a sentence, which does not show it."""
    if not HTTP_URL.fullmatch(text):
        raise ValueError("expected a URL such as http://collector:4318")
    return text.rstrip("/")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of the service. Raises ValueError with a sentence for a bad value."""

    engine: EngineConfig
    engine_command: tuple[str, ...] = (
        sys.executable,
        "-m",
        "runtime.process",
    )  # --parent=PID and the endpoint are appended
    sources: dict[str, Source] = {}  # of the values that are no defaults, by field
    config: Annotated[Path | None, Option("TOML file of options", "server", unset="none")] = None
    host: Annotated[str, Option("address to listen on", "server", variables=("HOST",))] = "127.0.0.1"
    port: Annotated[
        int, Option("port to listen on; 0: a free one", "server", variables=("PORT",), least=0, most=65535)
    ] = 8000
    api_key: Annotated[
        str | None,
        Option(
            "key that clients must send, except to health checks; it may do everything",
            "server",
            unset="no key",
            secret=True,
        ),
    ] = None
    keys_file: Annotated[
        Path | None,
        Option(
            "file of clients' keys, by `python -m service.keys`; read again when it changes", "server", unset="none"
        ),
    ] = None
    share_cache_between_keys: Annotated[
        bool, Option("let keys reuse each other's K/V, which tells them by cached tokens what others asked", "server")
    ] = False
    open_metrics: Annotated[bool, Option("answer /metrics, which names adapters and keys, without a key", "server")] = (
        False
    )
    insecure: Annotated[
        bool,
        Option(
            "listen on an address that is not this machine's own without a key, also for K/V events, which have none",
            "server",
        ),
    ] = False
    cors_origins: Annotated[
        tuple[str, ...],
        Option("origin whose pages may call the server, or * for any; repeatable", "server", unset="none"),
    ] = ()
    max_body_bytes: Annotated[int, Option("largest JSON body", "server", least=1)] = 16 * MIB
    max_connections: Annotated[int, Option("open connections of clients", "server", unit="connections", least=1)] = 1024
    drain_seconds: Annotated[
        float, Option("time for requests to end by themselves after a signal; a second signal ends them", "server")
    ] = 30.0
    otlp_endpoint: Annotated[
        str | None,
        Option(
            "URL of an OpenTelemetry collector that gets a trace of each request, over HTTP; OpenTelemetry's other "
            "variables are followed too",
            "server",
            variables=("OTEL_EXPORTER_OTLP_ENDPOINT",),
            unset="none",
            parse=http_url,
        ),
    ] = None
    kv_events: Annotated[
        str | None,
        Option(
            "ZeroMQ endpoint where blocks of K/V that are stored and removed are published in vLLM's layout, with the "
            "tokens of all prompts: * and this machine's own addresses are bound, others connected to",
            "K/V cache",
            unset="none",
            parse=endpoints.endpoint,
        ),
    ] = None
    kv_events_topic: Annotated[
        str, Option("topic of the events; llm-d reads kv@pod@model", "K/V cache", unset="an empty one")
    ] = ""
    kv_events_replay: Annotated[
        str | None,
        Option(
            "ZeroMQ endpoint to bind, which repeats the last 10000 batches of events to those who missed some",
            "K/V cache",
            unset="none",
            parse=endpoints.endpoint,
        ),
    ] = None
    routing_prefixes: Annotated[
        bool,
        Option("tell routers, in /routing, the hashes of the last base prompts whose K/V are cached", "K/V cache"),
    ] = False
    responses_store_bytes: Annotated[
        int, Option("memory for responses that clients may come back to; 0: none are kept", "server", least=0)
    ] = 64 * MIB
    engine_timeout_seconds: Annotated[
        float | None,
        Option(
            "an engine that gives no sign of life for so long is killed, and another started",
            "server",
            unset="ten times the longest step, at least 30",
            least=1,
        ),
    ] = None
    request_timeout_seconds: Annotated[
        float, Option("a generation that takes longer is ended with status 504; 0: none is", "scheduling", least=0)
    ] = 0.0
    max_queue_seconds: Annotated[
        float,
        Option(
            "a generation whose turn is expected to come later gets status 429 at once; 0: none does",
            "scheduling",
            least=0,
        ),
    ] = 0.0
    served_name: Annotated[
        str,
        Option(
            "name of the base model for clients",
            "model",
            name="served-model-name",
            aliases=("served-name",),
            unset="the model's own",
        ),
    ]
    tool_call_parser: Annotated[
        Family | None, Option("how the model writes tool calls", "model", unset="as its chat template does")
    ] = None
    reasoning_parser: Annotated[
        ReasoningFamily | None,
        Option("how the model writes its thoughts", "model", unset="as its chat template does"),
    ] = None
    chat_template: Annotated[
        str | None,
        Option("file of a chat template, or its text", "model", unset="the model's own", parse=template_text),
    ] = None
    allow_request_chat_template: Annotated[
        bool, Option("let requests bring a chat template, which is rendered in a sandbox", "model")
    ] = False
    store: Annotated[
        str | None,
        Option("s3://bucket[/prefix] that keeps adapters", "adapters", unset="the data directory", parse=store_url),
    ] = None
    data_directory: Annotated[
        Path, Option("keeps adapters, without --store", "adapters", unset="~/.local/share/rootstock")
    ]
    cache_directory: Annotated[
        Path, Option("keeps files of adapters, with --store", "adapters", unset="~/.cache/rootstock/adapters")
    ]
    disk_cache_bytes: Annotated[int, Option("largest size of the cache directory", "adapters", least=1)] = 8192 * MIB
    refresh_seconds: Annotated[float, Option("interval of looking for changes in the store", "adapters")] = 2.0
    # The name of an upload is written after its file, so a younger file may not have its name yet.
    collect_after_seconds: Annotated[
        float, Option("age at which files without a name are deleted", "adapters", least=60)
    ] = 900.0
    allowed_sources: Annotated[
        tuple[str, ...],
        Option(
            "allow imports from below s3://bucket, hf://org or file:///path; repeatable",
            "adapters",
            name="allow-source",
            unset="none",
        ),
    ] = ()
    unsigned_sources: Annotated[
        tuple[str, ...],
        Option(
            "read imports from below s3://bucket without credentials; repeatable",
            "adapters",
            name="unsigned-source",
            unset="none",
        ),
    ] = ()
    strict_base: Annotated[
        bool, Option("refuse adapters that name another base model, which otherwise is a warning", "adapters")
    ] = False
    alora_on_missing: Annotated[
        OnMissing,
        Option("what to do for a prompt without its aLoRA's invocation, if its request does not say", "adapters"),
    ] = "error"
    max_uploads: Annotated[
        int,
        Option("uploads and imports at one time; of one key or address one less", "adapters", unit="uploads", least=1),
    ] = 8
    max_upload_bytes: Annotated[int, Option("largest upload or import", "adapters", least=1)] = 2048 * MIB

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.served_name or any(character in self.served_name for character in "@:"):
            raise ValueError(f"the served name must not be empty or contain '@' or ':', not {self.served_name!r}")
        if self.api_key is not None and not KEY.fullmatch(self.api_key):
            raise ValueError("the API key must be printable ASCII, without spaces around it: no header has another one")
        for origin in self.cors_origins:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(f"an origin is * or like https://example.org:8443, without a path, not {origin!r}")
        if self.refresh_seconds <= 0:
            raise ValueError(f"refresh_seconds must be more than 0, not {self.refresh_seconds:g}")
        if self.kv_events is not None and not self.engine.prefix_cache:
            raise ValueError("kv_events says what the prefix cache keeps: leave it out, or leave prefix_cache on")
        if self.routing_prefixes and not self.engine.prefix_cache:
            raise ValueError(
                "routing_prefixes says what the prefix cache keeps: leave it out, or leave prefix_cache on"
            )
        self._require_own_endpoints()
        AllowedSources(self.allowed_sources)
        for url in self.unsigned_sources:
            store_url(url)
        if self.store is not None:
            store_of(self.store)

    def _require_own_endpoints(self) -> None:
        """Refuse events where others get them: they have the tokens of all prompts, and no key is asked for."""
        bound = {"kv_events_replay": self.kv_events_replay}
        if self.kv_events is not None and endpoints.binds(self.kv_events):
            bound["kv_events"] = self.kv_events
        for name, at in bound.items():
            if not (self.insecure or at is None or endpoints.is_own(at)):
                advice = "name one such as tcp://127.0.0.1:5557, or set --insecure"
                raise ValueError(f"{name}: {at} is not this machine's own address, and no key guards it: {advice}")


class Arguments(msgspec.Struct, frozen=True, kw_only=True):
    """The options as given, before the model's directory is known."""

    values: dict[str, Any]  # by field of Settings or EngineConfig; a field that is not set is missing
    sources: dict[str, Source]  # of the values that are no defaults, by field
    user_cache: Path

    @property
    def model(self) -> str | None:
        """A directory, a Hugging Face id, or None for the embedded model."""
        return self.values.get("model")

    @property
    def log_level(self) -> LogLevel:
        level: LogLevel = self.values.get("log_level", EngineConfig(model="").log_level)
        return level

    @property
    def log_format(self) -> LogFormat:
        form: LogFormat = self.values.get("log_format", EngineConfig(model="").log_format)
        return form

    def settings(self, model_directory: Path, name: str) -> Settings:
        """The settings for a model's directory; `name` is the default name. Raises ValueError with a sentence."""
        given = {"served_name": name, **self.values, "model": str(model_directory)}
        engine = {field: given.pop(field) for field in EngineConfig.__struct_fields__ if field in given}
        return Settings(engine=EngineConfig(**engine), sources=self.sources, **given)


def read(argv: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> Arguments:
    """Read the options of the service; None stands for the process's own command line or environment.

    The command line wins over the environment, and that over a file. A bad value ends the program with a sentence and
    status 2.
    """
    options = all_options()
    parser = Parser("python -m service", "Serve one base model and any number of LoRA adapters.", options)
    help_text = "print all options as a page in Markdown, and end"
    parser.add_argument("--help-table", action=PrintTable, const=table.page(options), help=help_text)
    for name, reason in ABSENT_OPTIONS.items():
        parser.add_argument(name, action=AbsentOption, nargs="?", const=reason)
    values, sources = read_with(parser, argv, environment)
    return Arguments(values=values, sources=sources, user_cache=user_cache_directory(environment))


def all_options() -> list[Declared]:
    """Every option of the service, in the order of their declarations."""
    return [*declared(Settings), *declared(EngineConfig)]


def read_with(parser: Parser, argv: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> Given:
    """What a parser reads, also in the file that its `--config` names, with the default directories.

    None as for `read`. The file may set options of the service that the parser has not.
    """
    environment = os.environ if environment is None else environment
    directories = _directories(environment)
    values, sources = parser.read(argv, environment)
    file = values.get("config")
    try:
        in_file = {} if file is None else read_file(file, all_options(), ABSENT_OPTIONS)
    except ValueError as error:
        parser.error(str(error))
    from_file: dict[str, Source] = dict.fromkeys(in_file, "file")
    return Given(directories | in_file | values, from_file | sources)


def read_program(options: Mapping[str, Any]) -> Arguments:
    """The options of a program that embeds the service, by their names, as a file has them; a path may be a Path.

    Of the environment it reads only where the user's directories are. None leaves an option unset. Raises ValueError
    with a sentence.
    """
    given = {name: _as_in_a_file(value) for name, value in options.items() if value is not None}
    values = read_values(given, all_options(), ABSENT_OPTIONS)
    sources: dict[str, Source] = dict.fromkeys(values, "program")
    return Arguments(values=_directories() | values, sources=sources, user_cache=user_cache_directory())


def _as_in_a_file(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _directories(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Where adapters are kept if no option says so; None stands for the process's own environment."""
    environment = os.environ if environment is None else environment
    data = Path(environment.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "rootstock"
    return {"data_directory": data, "cache_directory": user_cache_directory(environment) / "adapters"}


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What an engine or a sandbox gets of the environment; None stands for the process's own.

    Only what is known to matter to them, since any other variable may be a key or a credential under any name.
    """
    environment = os.environ if environment is None else environment
    return {
        name: value
        for name, value in environment.items()
        if CHILD_VARIABLE.fullmatch(name) and not SECRET_WORD.search(name)
    }


def user_cache_directory(environment: Mapping[str, str] | None = None) -> Path:
    """The directory of files that can be made again; None stands for the process's own environment."""
    environment = os.environ if environment is None else environment
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rootstock"
