"""The command line and the environment: the settings that they give, and the values that they refuse."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import service.__main__
from runtime.config import MIB, EngineConfig
from service.__main__ import main
from service.options.parser import Declared, declared, size, size_text
from service.settings import Settings, child_environment, read
from tests.service.tiny_model import CONFIG


def settings(*argv: str, **environment: str) -> Settings:
    return read(argv, environment).settings(Path("/models/mine"), "mine")


def test_the_defaults_are_loopback_and_the_embedded_model() -> None:
    found = settings(HOME="/home/someone")
    assert (found.host, found.port) == ("127.0.0.1", 8000)
    assert read([], {}).model is None
    assert found.served_name == "mine"
    assert found.engine == EngineConfig(model="/models/mine")
    assert found.api_key is None
    assert (found.store, found.allowed_sources, found.max_uploads) == (None, (), 8)
    assert (found.disk_cache_bytes, found.refresh_seconds, found.collect_after_seconds) == (8192 * MIB, 2.0, 900.0)


def test_the_environment_gives_defaults_and_the_command_line_wins() -> None:
    environment = {"HOST": "0.0.0.0", "PORT": "9000", "MODEL": "org/name", "XDG_DATA_HOME": "/data"}
    environment |= {"ROOTSTOCK_STORE": "s3://bucket/rootstock/", "XDG_CACHE_HOME": "/cache"}
    found = settings(**environment)
    assert (found.store, found.cache_directory) == ("s3://bucket/rootstock", Path("/cache/rootstock/adapters"))
    assert settings("--store", "s3://other", **environment).store == "s3://other"
    assert (found.host, found.port, found.data_directory) == ("0.0.0.0", 9000, Path("/data/rootstock"))
    assert read([], environment).model == "org/name"
    assert settings("--port", "1", "--host", "::1", **environment).port == 1


def test_options_of_the_engine_reach_it(tmp_path: Path) -> None:
    found = settings(
        *("--dtype", "float32", "--kv-cache-bytes", "64M", "--max-model-len", "512", "--max-running", "8"),
        *("--max-batch-tokens", "128", "--adapter-bytes", "1G", "--threads", "2", "--load-format", "dummy"),
        *("--max-waiting", "0", "--max-lora-rank", "64", "--host-adapter-bytes", "3G"),
        *("--allow-source", f"file://{tmp_path}", "--allow-source", "s3://bucket/team-a", "--max-uploads", "3"),
        *("--cache-directory", str(tmp_path), "--disk-cache-bytes", "5M", "--refresh-seconds", "0.5"),
        *("--collect-after-seconds", "60", "--host-kv-bytes", "4G"),
        *("--device", "cpu", "--kernels", "triton", "--no-cuda-graphs", "--no-overlap"),
        *("--max-upload-bytes", "10M", "--max-body-bytes", "1000", "--served-name", "base", "--api-key", "secret"),
    )
    assert found.engine == EngineConfig(
        model="/models/mine",
        dtype="float32",
        kv_cache_bytes=64 * MIB,
        max_model_len=512,
        max_running=8,
        max_batch_tokens=128,
        adapter_bytes=1024 * MIB,
        threads=2,
        load_format="dummy",
        max_waiting=0,
        max_lora_rank=64,
        host_adapter_bytes=3072 * MIB,
        host_kv_bytes=4096 * MIB,
        device="cpu",
        kernels="triton",
        cuda_graphs=False,
        overlap=False,
    )
    assert found.allowed_sources == (f"file://{tmp_path}", "s3://bucket/team-a")
    assert (found.cache_directory, found.disk_cache_bytes, found.max_uploads) == (tmp_path, 5 * MIB, 3)
    assert (found.refresh_seconds, found.collect_after_seconds) == (0.5, 60.0)
    assert (found.max_upload_bytes, found.max_body_bytes) == (10 * MIB, 1000)
    assert (found.served_name, found.api_key) == ("base", "secret")
    assert (found.engine.prefix_cache, settings("--no-prefix-cache").engine.prefix_cache) == (True, False)


# Each option with a text and the field and the value that it gives; an option that is declared and not here fails.
OPTIONS = {
    "--config": ("/dev/null", "config", Path("/dev/null")),
    "--otlp-endpoint": ("http://collector:4318/", "otlp_endpoint", "http://collector:4318"),
    "--log-format": ("json", "log_format", "json"),
    "--host": ("0.0.0.0", "host", "0.0.0.0"),
    "--port": ("0", "port", 0),
    "--api-key": ("a,key", "api_key", "a,key"),
    "--keys-file": ("/etc/keys.json", "keys_file", Path("/etc/keys.json")),
    "--share-cache-between-keys": ("yes", "share_cache_between_keys", True),
    "--open-metrics": ("yes", "open_metrics", True),
    "--insecure": ("yes", "insecure", True),
    "--max-connections": ("100", "max_connections", 100),
    "--drain-seconds": ("5", "drain_seconds", 5.0),
    "--cors-origins": ("https://example.org", "cors_origins", ("https://example.org",)),
    "--max-body-bytes": ("1000", "max_body_bytes", 1000),
    "--responses-store-bytes": ("5M", "responses_store_bytes", 5 * MIB),
    "--engine-timeout-seconds": ("60", "engine_timeout_seconds", 60.0),
    "--request-timeout-seconds": ("60", "request_timeout_seconds", 60.0),
    "--max-queue-seconds": ("2.5", "max_queue_seconds", 2.5),
    "--served-model-name": ("base", "served_name", "base"),
    "--tool-call-parser": ("mistral", "tool_call_parser", "mistral"),
    "--reasoning-parser": ("deepseek_r1", "reasoning_parser", "deepseek_r1"),
    "--chat-template": ("{{ messages }}", "chat_template", "{{ messages }}"),
    "--allow-request-chat-template": ("yes", "allow_request_chat_template", True),
    "--store": ("s3://bucket/team/", "store", "s3://bucket/team"),
    "--data-directory": ("/data", "data_directory", Path("/data")),
    "--cache-directory": ("/cache", "cache_directory", Path("/cache")),
    "--disk-cache-bytes": ("5m", "disk_cache_bytes", 5 * MIB),
    "--refresh-seconds": ("0.5", "refresh_seconds", 0.5),
    "--collect-after-seconds": ("60", "collect_after_seconds", 60.0),
    "--allow-source": ("s3://bucket/team-a", "allowed_sources", ("s3://bucket/team-a",)),
    "--unsigned-source": ("s3://public/", "unsigned_sources", ("s3://public/",)),
    "--strict-base": ("yes", "strict_base", True),
    "--alora-on-missing": ("base", "alora_on_missing", "base"),
    "--max-uploads": ("3", "max_uploads", 3),
    "--max-upload-bytes": ("10M", "max_upload_bytes", 10 * MIB),
    "--model": ("org/name", "model", "org/name"),
    "--dtype": ("float32", "dtype", "float32"),
    "--quantization": ("int8", "quantization", "int8"),
    "--load-format": ("dummy", "load_format", "dummy"),
    "--max-model-len": ("512", "max_model_len", 512),
    "--tensor-parallel-size": ("2", "tensor_parallel_size", 2),
    "--kv-cache-bytes": ("64M", "kv_cache_bytes", 64 * MIB),
    "--host-kv-bytes": ("4G", "host_kv_bytes", 4096 * MIB),
    "--kv-events": ("tcp://127.0.0.1:5557", "kv_events", "tcp://127.0.0.1:5557"),
    "--kv-events-topic": ("kv@pod@tiny", "kv_events_topic", "kv@pod@tiny"),
    "--kv-events-replay": ("ipc:///run/replay", "kv_events_replay", "ipc:///run/replay"),
    "--routing-prefixes": ("yes", "routing_prefixes", True),
    "--prefix-cache": ("no", "prefix_cache", False),
    "--max-running": ("8", "max_running", 8),
    "--max-waiting": ("0", "max_waiting", 0),
    "--max-batch-tokens": ("128", "max_batch_tokens", 128),
    "--adapter-bytes": ("2G", "adapter_bytes", 2048 * MIB),
    "--host-adapter-bytes": ("3G", "host_adapter_bytes", 3072 * MIB),
    "--max-lora-rank": ("64", "max_lora_rank", 64),
    "--threads": ("2", "threads", 2),
    "--device": ("cpu", "device", "cpu"),
    "--kernels": ("triton", "kernels", "triton"),
    "--gpu-memory-utilization": ("0.8", "gpu_memory_utilization", 0.8),
    "--cuda-graphs": ("off", "cuda_graphs", False),
    "--overlap": ("0", "overlap", False),
    "--log-level": ("debug", "log_level", "debug"),
}
DECLARED = [*declared(Settings), *declared(EngineConfig)]


def value_of(field: str, *argv: str, **environment: str) -> object:
    if field == "model":
        return read(argv, environment).model
    found = settings(*argv, **environment)
    return getattr(found if field in Settings.__struct_fields__ else found.engine, field)


def test_every_option_is_in_the_list_above() -> None:
    assert {f"--{option.name}" for option in DECLARED} == set(OPTIONS)
    fields = {*Settings.__struct_fields__, *EngineConfig.__struct_fields__}
    assert fields - {option.field for option in DECLARED} == {
        "engine",
        "engine_command",
        "sources",
        "block_size",
        "kv_changes",
        "bars",
    }


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_set_by_its_flag_and_by_its_variable(option: str) -> None:
    text, field, value = OPTIONS[option]
    assert value_of(field) != value
    flag = [option.replace("--", "--no-")] if value is False else [option] if value is True else [option, text]
    assert value_of(field, *flag) == value
    variable = "ROOTSTOCK_" + option.removeprefix("--").upper().replace("-", "_")
    assert value_of(field, **{variable: text}) == value


@pytest.mark.parametrize("declaration", DECLARED, ids=lambda declaration: declaration.name)
def test_help_shows_an_option_with_its_default_its_variables_and_its_aliases(
    declaration: Declared, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as end:
        read(["--help"], {})
    assert end.value.code == 0
    first = re.compile(rf"  --{declaration.name}[ ,]")
    [line] = [line for line in entries(capsys.readouterr().out) if first.match(line)]
    assert declaration.option.help in line
    for name in (*declaration.variables, *(f"--{alias}" for alias in declaration.option.aliases)):
        assert name in line


def entries(text: str) -> list[str]:
    """The lines of --help, each joined with its continuation."""
    return text.replace("\n" + " " * 36, " ").splitlines()


def test_help_shows_defaults_as_one_would_write_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        read(["--help"], {"ROOTSTOCK_API_KEY": "a-secret", "ROOTSTOCK_PORT": "many"})
    text = capsys.readouterr().out
    for shown in (
        "[2G; ROOTSTOCK_HOST_ADAPTER_BYTES]",
        "[8G; ROOTSTOCK_DISK",
        "[0; ROOTSTOCK_HOST_KV",
        "[900; ",
        "[yes; ",
    ):
        assert shown in text
    assert "a-secret" not in text


@pytest.mark.parametrize("value", [0, 1, 1000, 1024, 1536, 5 * MIB, 1024 * MIB, 2**40])
def test_a_size_is_shown_as_it_is_read(value: int) -> None:
    assert size(size_text(value)) == value


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--served-name", "base"], "served_name", "base"),
        (["--max-num-seqs", "8"], "max_running", 8),
        (["--max-num-batched-tokens", "512"], "max_batch_tokens", 512),
        (["--kv-cache-memory-bytes", "64M"], "kv_cache_bytes", 64 * MIB),
        (["--no-enable-prefix-caching"], "prefix_cache", False),
        (["--no-prefix-cache", "--enable-prefix-caching"], "prefix_cache", True),
        (["--max-running", "8", "--max-num-seqs", "9"], "max_running", 9),
    ],
)
def test_names_that_other_servers_use_work(argv: list[str], field: str, value: object) -> None:
    assert value_of(field, *argv) == value


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--enable-lora"], "LoRA is always enabled"),
        (["--enable-lora", "--port", "0"], "LoRA is always enabled"),
        (["--max-loras", "4"], "use --adapter-bytes"),
        (["--allowed-origins", '["*"]'], "use --cors-origins"),
        (["--max-cpu-loras=16"], "use --host-adapter-bytes"),
    ],
)
def test_an_option_of_other_servers_that_has_no_meaning_here_is_explained(
    argv: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        read(argv, {})
    assert end.value.code == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"rootstock: argument {argv[0].split('=')[0]}: ")
    assert reason in sentence


def test_the_command_line_wins_over_a_variable_and_an_options_own_variable_over_a_short_one() -> None:
    assert value_of("port", PORT="1", ROOTSTOCK_PORT="2") == 2
    assert value_of("port", "--port", "3", PORT="1", ROOTSTOCK_PORT="2") == 3
    assert value_of("port", "--port", "3", ROOTSTOCK_PORT="many") == 3
    assert value_of("prefix_cache", "--prefix-cache", ROOTSTOCK_PREFIX_CACHE="off") is True
    assert value_of("max_running", "--max-num-seqs", "3", ROOTSTOCK_MAX_RUNNING="4") == 3
    sources = ("--allow-source", "s3://bucket-a", "--allow-source", "s3://bucket-b")
    assert value_of("allowed_sources", *sources, ROOTSTOCK_ALLOW_SOURCE="hf://org") == (
        "s3://bucket-a",
        "s3://bucket-b",
    )


def test_a_child_gets_the_variables_that_matter_to_it_and_no_secret() -> None:
    names = "PATH HOME TMPDIR LD_LIBRARY_PATH LC_ALL PYTHONPATH XDG_CACHE_HOME CUDA_VISIBLE_DEVICES CUDA_HOME CXX "
    names += "NVIDIA_VISIBLE_DEVICES OMP_NUM_THREADS MKL_NUM_THREADS PYTORCH_CUDA_ALLOC_CONF TRITON_CACHE_DIR HF_HOME "
    names += "TRITON_INTERPRET TORCHINDUCTOR_CACHE_DIR HF_HUB_OFFLINE TOKENIZERS_PARALLELISM MALLOC_ARENA_MAX"
    needed = dict.fromkeys(names.split(), "a value")
    secrets = "ROOTSTOCK_API_KEY AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_PROFILE HF_TOKEN HUGGING_FACE_HUB_TOKEN "
    secrets += "OPENAI_API_KEY DATABASE_URL GOOGLE_APPLICATION_CREDENTIALS PGPASSWORD MINIO_ROOT_PASSWORD"
    assert child_environment(needed | dict.fromkeys(secrets.split(), "a secret")) == needed


def test_an_empty_variable_sets_nothing() -> None:
    assert settings(ROOTSTOCK_API_KEY="", ROOTSTOCK_STORE="", PORT="", ROOTSTOCK_PREFIX_CACHE="") == settings()


def test_a_variable_that_kubernetes_sets_for_a_service_of_our_name_is_ignored() -> None:
    assert value_of("port", ROOTSTOCK_PORT="tcp://10.0.0.1:80") == 8000
    assert value_of("port", ROOTSTOCK_PORT="tcp://10.0.0.1:80", PORT="9000") == 9000


@pytest.mark.parametrize("text", ["s3://bucket-a,hf://org", "s3://bucket-a\nhf://org\n", " s3://bucket-a , hf://org,"])
def test_a_list_in_a_variable_is_separated_by_commas_or_newlines(text: str) -> None:
    assert value_of("allowed_sources", ROOTSTOCK_ALLOW_SOURCE=text) == ("s3://bucket-a", "hf://org")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--port", "70000"], "argument --port: must be at most 65535, not 70000"),
        (["--port", "http"], "'http' is not a whole number"),
        (["--kv-cache-bytes", "2T"], "'2T' is not a number of bytes"),
        (["--kv-cache-bytes", "0"], "argument --kv-cache-bytes: must be at least 1, not 0"),
        (["--max-model-len", "-1"], "max-model-len"),
        (
            ["--max-running", "600", "--max-batch-tokens", "256"],
            "max_batch_tokens (256) must be at least max_running (600)",
        ),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--host-kv-bytes", "1G", "--no-prefix-cache"], "host_kv_bytes must be 0 without prefix_cache"),
        (["--max-body-bytes", "0"], "argument --max-body-bytes: must be at least 1, not 0"),
        (["--served-name", "a@b"], "must not be empty or contain"),
        (["--allow-source", "file:///nowhere/at/all"], "'file:///nowhere/at/all' is not a directory"),
        (["--allow-source", "https://example.com"], "the allowed source 'https://example.com' is not accepted"),
        (["--allow-source", "s3://bucket", "--allow-source", "s3://A"], "'A' is not the name of a bucket"),
        (["--unsigned-source", "hf://org"], "'hf://org': a store is s3://bucket"),
        (["--store", "/srv/adapters"], "argument --store: '/srv/adapters': expected s3://"),
        (["--store", "hf://org/repo"], "a store is s3://bucket"),
        (["--store", "s3://key:secret@bucket"], "is not the name of a bucket"),
        (["--disk-cache-bytes", "0"], "argument --disk-cache-bytes: must be at least 1, not 0"),
        (["--host-adapter-bytes", "0"], "argument --host-adapter-bytes: must be at least 1, not 0"),
        (["--max-uploads", "0"], "argument --max-uploads: must be at least 1, not 0"),
        (["--api-key", "sécret"], "the API key must be printable ASCII"),
        (["--api-key", " secret"], "the API key must be printable ASCII"),
        (["--refresh-seconds", "0"], "refresh_seconds must be more than 0"),
        (["--refresh-seconds", "-1"], "refresh-seconds"),
        (["--max-num-seqs", "0"], "argument --max-num-seqs: must be at least 1, not 0"),
        (["--collect-after-seconds", "59.9"], "argument --collect-after-seconds: must be at least 60, not 59.9"),
        (["--collect-after-seconds", "soon"], "'soon' is not a number of seconds"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["--model", "nobody/nothing"], "nobody/nothing is not a directory, and cannot be fetched from the hub"),
        (["--host", "no such host"], "cannot listen on no such host"),
        (["--log-level", "loud"], "argument --log-level: invalid choice: 'loud' is not one of debug, info"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
)
def test_a_bad_value_ends_the_program_with_a_sentence(
    tiny_model: Path, argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--model" in argv else ["--model", str(tiny_model)]
    with pytest.raises(SystemExit) as end:
        main([*model, *argv], {})
    assert end.value.code == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("rootstock: ")
    assert complaint in sentence


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("PORT", "eighty", "PORT: 'eighty' is not a whole number"),
        ("MODEL", "./nowhere", "the model directory ./nowhere does not exist"),
        ("ROOTSTOCK_STORE", "bucket", "ROOTSTOCK_STORE: 'bucket': expected s3://"),
        ("ROOTSTOCK_KV_CACHE_BYTES", "0", "ROOTSTOCK_KV_CACHE_BYTES: must be at least 1, not 0"),
        (
            "ROOTSTOCK_DTYPE",
            "int8",
            "ROOTSTOCK_DTYPE: invalid choice: 'int8' is not one of auto, bfloat16, float16, float32",
        ),
        ("ROOTSTOCK_PREFIX_CACHE", "maybe", "ROOTSTOCK_PREFIX_CACHE: 'maybe' is not one of 1, true, yes, on, 0, false"),
        ("ROOTSTOCK_REFRESH_SECONDS", "soon", "ROOTSTOCK_REFRESH_SECONDS: 'soon' is not a number of seconds"),
    ],
)
def test_a_bad_value_in_the_environment_is_refused_with_one_sentence(
    name: str, value: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([], {name: value})
    assert end.value.code == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"rootstock: {complaint}")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_that_others_reach_needs_a_key_or_a_word(
    tiny_model: Path, host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--model", str(tiny_model), "--host", host, "--port", "0"]
    with pytest.raises(SystemExit) as end:
        main(argv, {})
    assert end.value.code == 2
    assert "is not this machine's own address: set --keys-file or --api-key, or --insecure" in capsys.readouterr().err
    listening: list[str] = []
    monkeypatch.setattr(service.__main__, "serve", lambda settings, listener: record(listening, settings.host))
    for allowed in (["--api-key", "secret"], ["--insecure"]):
        main([*argv, *allowed], {})
    assert listening == [host, host]


async def record(listening: list[str], host: str) -> None:
    listening.append(host)


def test_a_port_in_use_is_refused_before_the_model_is_loaded(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as end:
        main(["--model", str(tiny_model), "--port", str(taken.getsockname()[1])], {})
    assert end.value.code == 2
    assert "Address already in use" in capsys.readouterr().err


def test_a_model_that_cannot_be_served_is_named(tmp_path: Path) -> None:
    config = {**CONFIG, "vocab_size": 300, "architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "service", "--model", str(tmp_path), "--port", "0"]
    command += ["--data-directory", str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "T5ForConditionalGeneration" in done.stderr
    assert "Traceback" not in done.stderr
