"""The command line and the environment: what they set, and what they refuse."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.config import MIB, EngineConfig
from service.__main__ import main
from service.settings import Settings, read
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


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--port", "70000"], "70000 is not between 0 and 65535"),
        (["--port", "http"], "'http' is not a whole number"),
        (["--kv-cache-bytes", "2T"], "'2T' is not a number of bytes"),
        (["--kv-cache-bytes", "0"], "kv_cache_bytes must be at least 1"),
        (["--max-model-len", "-1"], "max-model-len"),
        (["--max-running", "600"], "max_batch_tokens (256) must be at least max_running (600)"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--host-kv-bytes", "1G", "--no-prefix-cache"], "host_kv_bytes must be 0 without prefix_cache"),
        (["--max-body-bytes", "0"], "max_body_bytes must be at least 1"),
        (["--served-name", "a@b"], "must not be empty or contain"),
        (["--allow-source", "file:///nowhere/at/all"], "'file:///nowhere/at/all' is not a directory"),
        (["--allow-source", "https://example.com"], "the allowed source 'https://example.com' is not accepted"),
        (["--allow-source", "s3://bucket", "--allow-source", "s3://A"], "'A' is not the name of a bucket"),
        (["--store", "/srv/adapters"], "argument --store: '/srv/adapters': expected s3://"),
        (["--store", "hf://org/repo"], "a store is s3://bucket"),
        (["--store", "s3://key:secret@bucket"], "is not the name of a bucket"),
        (["--disk-cache-bytes", "0"], "disk_cache_bytes must be at least 1"),
        (["--host-adapter-bytes", "0"], "host_adapter_bytes must be at least 1"),
        (["--max-uploads", "0"], "max_uploads must be at least 1"),
        (["--refresh-seconds", "0"], "refresh_seconds must be more than 0"),
        (["--refresh-seconds", "-1"], "refresh-seconds"),
        (["--collect-after-seconds", "soon"], "'soon' is not a number of seconds"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["--model", "nobody/nothing"], "nobody/nothing is no directory, and cannot be fetched from the hub"),
        (["--host", "no such host"], "cannot listen on no such host"),
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
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("PORT", "eighty"), ("MODEL", "./nowhere"), ("ROOTSTOCK_STORE", "bucket")])
def test_a_bad_value_in_the_environment_is_refused_as_well(
    name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([], {name: value})
    assert end.value.code == 2
    assert value in capsys.readouterr().err


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
