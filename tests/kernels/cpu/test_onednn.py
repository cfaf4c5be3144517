"""Products by oneDNN take a bounded amount of memory, however many numbers of rows they meet."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Each product is compiled for its shape. Without a bound on what is kept, 600 of them take more than 300 MB.
PROGRAM = """
import re
from pathlib import Path

import torch

from kernels.cpu import onednn


def megabytes():
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000


torch.set_num_threads(1)
dtype = torch.bfloat16 if onednn.computes(torch.bfloat16) else torch.float32
weights = [onednn.packed(torch.ones(columns, 64, dtype=dtype)) for columns in (64, 128, 192)]
held = []
for rows in range(1, 201):
    for weight in weights:
        onednn.linear(torch.ones(rows, 64, dtype=dtype), weight)
    held.append(megabytes())
print(held[19], held[-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc, which only Linux has")
def test_products_of_ever_new_numbers_of_rows_do_not_pile_up() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    early, late = map(float, ended.stdout.split())
    assert late - early < 60
