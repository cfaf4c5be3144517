"""The load test, run as a user runs it against a live server with a tiny random model."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import msgspec
import pytest

from loadtests.adapter_client import AdapterClient
from loadtests.api_key import asking_for
from loadtests.random_adapter import adapter_file, write_adapter
from loadtests.server_process import ServerFailed, running_server
from tests.loadtests.commands import ROOT, SHAPE, SMALL, run

BAD_KEY = "schlüssel"


def put_adapter(url: str, directory: Path, name: str, seed: int) -> None:
    write_adapter(directory / name, SHAPE, seed, rank=4)
    files = {path.name: (path.name, path.read_bytes()) for path in (directory / name).iterdir()}
    assert httpx.put(f"{url}/adapters/{name}", files=files, timeout=60).status_code in (200, 201)


def locust(url: str, *options: str, file: str = "locustfile") -> subprocess.CompletedProcess[str]:
    command = ["-m", "locust", "-f", f"loadtests/{file}.py", "--headless", "--host", url, "--users", "3"]
    return run(*command, "--spawn-rate", "3", "--max-tokens", "8", "--run-time", "60s", "--json", *options)


def test_users_stream_through_every_adapter_and_the_popular_ones_most(server: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("rare", "popular")):
        put_adapter(server, tmp_path, name, seed)
    result = locust(server, "--requests", "40", "--models", "popular,tiny,rare", "--popularity", "2")
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
    result = locust(server, "--requests", "30", "--popularity", "0")
    assert result.returncode == 0, result.stderr
    assert {"tiny", "found"} <= {entry["name"] for entry in msgspec.json.decode(result.stdout)}


def test_users_of_all_served_models_chat_with_alora_adapters_too(server: str) -> None:
    with AdapterClient(server) as client:
        client.put("activated", adapter_file(SHAPE, 3, 4, [510, 600]))
        client.put("plain", adapter_file(SHAPE, 4, 4))
        try:
            result = locust(server, "--requests", "40", "--popularity", "0")
        finally:
            for name in ("activated", "plain"):
                client.delete(name)
    assert result.returncode == 0, result.stderr
    entries = {(entry["method"], entry["name"]): entry for entry in msgspec.json.decode(result.stdout)}
    assert sum(entry["num_failures"] for entry in entries.values()) == 0
    assert all(entries["first token", name]["num_requests"] > 0 for name in ("activated", "plain", "tiny"))


def test_pipeline_users_find_the_alora_adapters_and_have_them_check_every_turn(server: str) -> None:
    missing = locust(server, "--requests", "1", file="locust_pipeline")
    assert "no aLoRA adapters" in missing.stderr
    with AdapterClient(server) as client:
        for seed, name in enumerate(("doubt", "trust")):
            client.put(name, adapter_file(SHAPE, seed, 4, [500 + seed, 600]))
        try:
            result = locust(server, "--requests", "30", "--turns", "2", file="locust_pipeline")
        finally:
            for name in ("doubt", "trust"):
                client.delete(name)
    assert result.returncode == 0, result.stderr
    entries = {(entry["method"], entry["name"]): entry for entry in msgspec.json.decode(result.stdout)}
    assert sum(entry["num_failures"] for entry in entries.values()) == 0
    counts = [entries["POST", name]["num_requests"] for name in ("tiny", "doubt", "trust")]
    assert counts[0] >= counts[1] >= counts[2] > 0
    cached = entries["cached percent", "trust"]
    assert 10 < cached["total_response_time"] / cached["num_requests"] <= cached["max_response_time"] <= 100


def test_a_request_that_fails_is_counted_as_a_failure(server: str) -> None:
    result = locust(server, "--requests", "3", "--models", "nobody")
    assert result.returncode == 1
    (entry,) = msgspec.json.decode(result.stdout)
    assert entry["num_failures"] == entry["num_requests"] > 0
    assert "model_not_found" in result.stderr


def test_a_server_that_does_not_start_shows_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match="nowhere"), running_server(["--model", str(tmp_path / "nowhere")]):
        pass


def test_a_key_that_a_server_refuses_ends_the_test_with_its_reason_and_without_the_key(tiny_model: Path) -> None:
    command = ["--model", str(tiny_model)]
    with (
        pytest.raises(ServerFailed, match="must be printable ASCII") as failed,
        running_server(command, asking_for(BAD_KEY)),
    ):
        pass
    assert BAD_KEY not in str(failed.value)


PROGRAM = """
import sys, time
from loadtests.server_process import started_server
with started_server(sys.argv[1:]) as server:
    print(server.pid, flush=True)
    time.sleep(60)
"""


def test_a_program_that_is_terminated_ends_its_server(tiny_model: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, "--model", str(tiny_model), *SMALL]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        server = int(program.stdout.readline())
        program.terminate()
        assert program.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
