"""Runs the programs of loadtests as a user does, and reads the tables that they print."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = ["--load-format", "dummy", "--kv-cache-bytes", "32M"]  # arguments of a server of the tiny model
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program with more variables in its environment."""
    program = [sys.executable, *command]
    return subprocess.run(
        program, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **variables}
    )


def bench(model: Path, *arguments: str) -> list[tuple[list[list[str]], str]]:
    """Run benchmarks; return the cells of each table, the head first, and the conditions below it."""
    server = f"--server-args={' '.join(SMALL)}"
    result = run("-m", "loadtests.bench", *arguments, "--model", str(model), server)
    assert result.returncode == 0, result.stderr
    parts = result.stdout.strip().split("\n\n")
    assert all(title.startswith("### ") for title in parts[::3])
    return [(cells(table), stated) for table, stated in zip(parts[1::3], parts[2::3], strict=True)]


def cells(table: str) -> list[list[str]]:
    head, rule, *rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in table.splitlines()]
    assert rule == ["---"] * len(head)
    assert all(len(row) == len(head) for row in rows)
    return [head, *rows]


def number(cell: str) -> float:
    """Return the number at the beginning of a cell, without its unit and its verdict."""
    return float(cell.split()[0].rstrip("%×"))
