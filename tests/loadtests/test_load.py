"""The load test and the benchmark, run as a user runs them against a live server with a tiny random model."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from loadtests.random_adapter import write_adapter
from loadtests.server_process import ServerFailed, running_server

ROOT = Path(__file__).parents[2]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@pytest.fixture(scope="module")
def tiny_model(default_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model's tokenizer over a model of two narrow layers, whose weights the server makes up."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    directory.mkdir()
    for name in TOKENIZER_FILES:
        shutil.copy(default_model_path / name, directory)
    config = json.loads((default_model_path / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **SHAPE}))
    return directory


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[str]:
    with running_server(["--model", str(tiny_model), "--load-format", "dummy", "--kv-cache-bytes", "32M"]) as url:
        yield url


def put_adapter(url: str, directory: Path, name: str, seed: int) -> None:
    write_adapter(directory / name, SHAPE, seed, rank=4)
    files = {path.name: (path.name, path.read_bytes()) for path in (directory / name).iterdir()}
    assert httpx.put(f"{url}/adapters/{name}", files=files, timeout=60).status_code in (200, 201)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)


def locust(url: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--host", url, "--users", "3"]
    return run(*command, "--spawn-rate", "3", "--max-tokens", "8", "--json", *options)


def test_users_stream_through_every_adapter_and_the_popular_ones_most(server: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("rare", "popular")):
        put_adapter(server, tmp_path, name, seed)
    result = locust(server, "--run-time", "5s", "--models", "popular,tiny,rare", "--popularity", "2")
    assert result.returncode == 0, result.stderr
    entries = msgspec.json.decode(result.stdout)
    assert sum(entry["num_failures"] for entry in entries) == 0
    counts = {(entry["method"], entry["name"]): entry["num_requests"] for entry in entries}
    assert counts["POST", "popular"] > counts["POST", "tiny"] > 0
    assert counts["POST", "popular"] > counts["POST", "rare"]
    assert counts["first token", "popular"] > 0
    assert counts["per token", "popular"] > 0
    first = next(entry for entry in entries if (entry["method"], entry["name"]) == ("first token", "popular"))
    whole = next(entry for entry in entries if (entry["method"], entry["name"]) == ("POST", "popular"))
    assert 0 < first["total_response_time"] / first["num_requests"] < whole["max_response_time"]


def test_users_find_the_served_models_by_themselves(server: str, tmp_path: Path) -> None:
    put_adapter(server, tmp_path, "found", 2)
    result = locust(server, "--run-time", "3s", "--popularity", "0")
    assert result.returncode == 0, result.stderr
    assert {"tiny", "found"} <= {entry["name"] for entry in msgspec.json.decode(result.stdout)}


def test_a_request_that_fails_is_counted_as_a_failure(server: str) -> None:
    result = locust(server, "--run-time", "2s", "--models", "nobody")
    assert result.returncode == 1
    (entry,) = msgspec.json.decode(result.stdout)
    assert entry["num_failures"] == entry["num_requests"] > 0
    assert "model_not_found" in result.stderr


def test_the_benchmark_prints_a_row_for_every_load_and_its_conditions(server: str, tiny_model: Path) -> None:
    small = ["--requests", "1", "--prompt-words", "5", "--max-tokens", "4", "--concurrency", "1", "2"]
    peer = ["--peer", server, "--peer-models", "tiny,bench-a,bench-b,bench-c,bench-d"]
    result = run("-m", "loadtests.bench", "--url", server, "--model", str(tiny_model), *small, *peer)
    assert result.returncode == 0, result.stderr
    table, conditions = result.stdout.split("\n\n")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert Counter(map(len, rows)) == {len(rows[0]): 8}
    loads = [(concurrency, model) for concurrency in "12" for model in ("base", "one adapter", "four adapters mixed")]
    assert [tuple(row[:2]) for row in rows[2:]] == loads
    assert [row[3] for row in rows[2:] if row[1] == "base"] == ["100%", "100%"]
    assert all(float(cell) > 0 for row in rows[2:] for cell in (row[2], row[4], row[5]))
    for word in ("cores", "bfloat16", "5 random words", "4 new tokens", "torch"):
        assert word in conditions


def test_the_benchmark_says_why_it_cannot_measure(tiny_model: Path, server: str) -> None:
    result = run("-m", "loadtests.bench", "--url", server, "--model", str(tiny_model), "--max-tokens", "1000000")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("failed: ")
    assert "Traceback" not in result.stderr


def test_a_server_that_does_not_start_shows_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match="nowhere"), running_server(["--model", str(tmp_path / "nowhere")]):
        pass
