"""Tests of README.md: its commands run against a server, and its tables and links name what exists."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from loadtests.server_process import running_server
from openapi.operations import OPERATIONS
from service.settings import read

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = ("README.md", "BENCHMARKS.md")
CURLRC = "silent\nshow-error\nfail-with-body\n"  # an error status ends the block
ADDRESS, SOURCE = "http://127.0.0.1:8000", "file:///srv/adapters"  # in the README; the test has its own

# Blocks of commands that no test can run, by their text, with the reason.
NOT_RUN = {
    "make serve": "makes an environment with pip, then serves without end; the tests start the same server",
    "make serve MODEL=Qwen/Qwen3-0.6B PORT=8000": "fetches a model from Hugging Face",
    "make serve ARGS=--help": "makes an environment with pip; the options are compared with --help below",
    "docker build --tag rootstock . && docker run --publish 127.0.0.1:8000:8000 --volume rootstock-data:/data "
    "--volume rootstock-cache:/cache rootstock": "builds an image from the network",
    "docker compose up --build": "builds an image from the network; tests/test_compose.py checks compose.yaml",
    ".venv/bin/python -m service.keys add team-a --keys-file keys.json --scopes generate,manage --adapter-prefix "
    "team-a/": "makes a file; tests/service/keys/ runs the program",
    ".venv/bin/python -m service.keys list --keys-file keys.json": "the same",
    ".venv/bin/python -m service.keys revoke team-a --keys-file keys.json": "the same",
    "make serve HOST=0.0.0.0 ARGS='--keys-file keys.json'": "serves without end, on an address that others reach",
    "docker compose --profile gpu up --build rootstock-gpu": "the same, on a GPU",
    ".venv/bin/pip install --editable '.[gpu]' && .venv/bin/python -m tools.gpu_report": "needs a GPU",
    ".venv/bin/python -m tools.first_gpu right": "needs a GPU; tests/tools runs it dry",
    "make test": "runs the tests, this one among them",
    "make test-quick": "runs some of these tests",
    "make test-clients": "makes an environment of its own from the network",
    "make test-contract": "makes an environment of its own from the network",
    "make .venv-ray/made": "makes an environment of its own from the network",
    ".venv-ray/bin/serve run service.ray.app:app replicas=2": "needs that environment; tests/ray runs the application",
    "make test-ray": "makes an environment of its own from the network",
    "make test-kills": "takes many minutes; the tests run two rounds of it",
    "make fuzz": "takes a minute or more; the tests run some of it",
    "make test-page": "makes an environment of its own from the network, and needs a browser",
    "make check": "runs beside the tests",
    "make bench": "takes many minutes",
    "make load": "takes minutes; tests/loadtests/test_load_report.py runs short ones",
    "make simulate": "takes a minute; tests/loadtests/test_simulation_programs.py runs a short one",
    "make soak": "takes ten minutes; tests/loadtests/test_soak.py runs a short one",
}


class Block(NamedTuple):
    """A block of commands or of a program, and the output that the README shows below it, if any."""

    language: str
    text: str
    output: str | None

    @property
    def commands(self) -> list[str]:
        """The lines without their comments."""
        return [re.sub(r"\s+# .*", "", line).strip() for line in self.text.splitlines()]


def blocks(*languages: str) -> list[Block]:
    fence = re.compile(r"^```(\w+)\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.M | re.S)
    return [Block(*found.groups()) for found in fence.finditer(README) if found[1] in languages]


def shown(output: str) -> str:
    """The pattern of an output; "…" stands for any text within a line."""
    return re.escape(output).replace("…", ".*")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    section = re.split(r"^## ", README.split(f"\n## {heading}\n")[1], flags=re.M)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture(scope="module")
def substitutes(default_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The test's own address of a server and source of adapters, by those that the README names."""
    source = tmp_path_factory.mktemp("adapters")
    shutil.copytree(ROOT / "tests" / "adapters" / "cobalt", source / "poet")
    with running_server(["--threads", "1", "--allow-source", f"file://{source}"]) as url:
        yield {ADDRESS: url, SOURCE: f"file://{source}"}


def test_the_commands_give_the_output_that_is_shown(substitutes: dict[str, str], tmp_path: Path) -> None:
    """All blocks in their order, since later ones use what earlier ones have uploaded."""
    if shutil.which("curl") is None:
        pytest.skip("the README's commands call curl, which is not installed")
    (tmp_path / ".curlrc").write_text(CURLRC)
    for block in blocks("sh"):
        if "curl" not in block.text:
            continue
        script = block.text
        for written, ours in substitutes.items():
            script = script.replace(written, ours)
        command = ["bash", "-euo", "pipefail", "-c", script]
        environment = {**os.environ, "CURL_HOME": str(tmp_path)}
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, f"{block.text}\n{ended.stdout}\n{ended.stderr}"
        if block.output is not None:
            assert re.fullmatch(shown(block.output), ended.stdout), f"{block.text}\n{ended.stdout}"


def test_the_program_prints_what_is_shown(default_model_path: Path) -> None:
    [block] = blocks("python")
    assert block.output is not None
    command = [sys.executable, "-c", block.text]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert re.fullmatch(shown(block.output), ended.stdout)


def test_every_command_is_run_or_listed_with_the_reason() -> None:
    listed = [command for block in blocks("sh") if "curl" not in block.text for command in block.commands]
    assert sorted(listed) == sorted(NOT_RUN)
    assert set(re.findall(r"^```(\w+)$", README, re.M)) == {"sh", "python", "text"}
    assert blocks("text") == [], "an output stands right below the commands that give it"


def test_the_table_of_endpoints_is_complete() -> None:
    calls = re.findall(r"`(GET|POST|PUT|PATCH|DELETE) (/[^`]*)`", " ".join(row[0] for row in rows("Endpoints")))
    assert sorted(calls) == sorted(OPERATIONS)


def test_the_options_exist_with_their_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # one line for each option
    with pytest.raises(SystemExit):
        read(["--help"], {})
    text = capsys.readouterr().out.replace("\n" + " " * 36, " ")  # a long name has its help on the next line
    defaults = dict(re.findall(r"^  (--[\w-]+) .*\[([^;\]]*);", text, re.M))
    table = {option.strip("`"): default for option, default, _ in rows("Options")}
    assert len(table) >= 10
    assert table == {option: defaults.get(option) for option in table}


def test_the_map_names_every_directory_of_the_source() -> None:
    named = {path.strip("`/") for row in rows("Map") for path in re.findall(r"`[\w]+/`", row[0])}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert named == packages | {"tests"}
    for cell, described in rows("Map"):
        top = [ROOT / path.strip("`/") for path in re.findall(r"`[\w]+/`", cell)]
        for inner in re.findall(r"`(\w+)/`", described):
            assert any((path / inner).is_dir() for path in top), f"{cell}: {inner}/"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_module_and_target_that_is_named_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    files = re.findall(r"`((?:\w+/)+\w+\.\w+)`", text)
    modules = [name.replace(".", "/") for name in re.findall(r"python -m ([\w.]+)", text)]
    missing = {path for path in (*links, *files) if not (ROOT / path).exists()}
    missing |= {path for path in modules if not ((ROOT / f"{path}.py").exists() or (ROOT / path).is_dir())}
    assert missing == set()
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^(?:\| `)?make ([\w-]+)", text, re.M)) <= targets
