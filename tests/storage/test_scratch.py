"""Scratch directories: gone with their process, and there as long as it needs them."""

import shutil
import subprocess
import sys
from pathlib import Path

from storage.scratch import Scratch

ROOT = Path(__file__).parents[2]

OPENS_AND_CLOSES = """
import sys
from pathlib import Path
from storage.scratch import Scratch
for turn in range(300):
    scratch = Scratch(Path(sys.argv[1]))
    for number in range(3):
        (scratch.path / str(number)).write_bytes(b"x")
    scratch.close()
"""


def test_two_processes_that_open_and_close_all_the_time_never_stumble(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPENS_AND_CLOSES, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]

    assert [process.wait() for process in processes] == [0, 0]
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_scratch_directory_is_left_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    root = tmp_path / "root"
    root.mkdir()
    (root / "a file").write_bytes(b"stray")
    (root / "a link").symlink_to(elsewhere)
    (root / "a link to nothing").symlink_to(tmp_path / "nothing")

    Scratch(root).close()
    assert sorted(path.name for path in root.iterdir()) == ["a file", "a link", "a link to nothing"]
    assert elsewhere.is_dir()


def test_a_directory_that_a_cleaner_removed_is_made_again_and_is_still_ones_own(tmp_path: Path) -> None:
    root = tmp_path / "root"
    scratch = Scratch(root)
    before = scratch.path
    for removed in (before, root):
        shutil.rmtree(removed)
        (scratch.path / "a file").write_bytes(b"staged")
        Scratch(root).close()  # which sweeps

        assert scratch.path == before
        assert (before / "a file").read_bytes() == b"staged"
    scratch.close()
    assert list(root.iterdir()) == []


def test_a_closed_one_is_not_made_again(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "root")
    shutil.rmtree(tmp_path / "root")
    scratch.close()
    scratch.close()

    assert not scratch.path.exists()
    assert not (tmp_path / "root").exists()
