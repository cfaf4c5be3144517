"""Whether a directory is still the one that a store was opened in."""

import os
import secrets
from pathlib import Path

from storage.files import sync_directory, temporary_file
from storage.scratch import locked
from storage.store import StoreLost

FILE = "_store"  # no key, so no object; and not hidden, so that what removes all objects removes it, too


class Identity:
    """A random word in a file of a directory, which tells whether the directory was emptied or replaced meanwhile.

    Without it a directory that was emptied looks like a store without objects. Raises OSError.
    """

    def __init__(self, root: Path, scratch: Path) -> None:
        self._root, self._file = root, root / FILE
        with locked(root):
            if not self._file.exists():
                _write(self._file, scratch)
            self._word = self._file.read_bytes()

    def check(self) -> None:
        """Raises StoreLost if the directory is not the one that was opened, OSError."""
        try:
            same = self._file.read_bytes() == self._word
        except (FileNotFoundError, NotADirectoryError):
            same = False
        if not same:
            raise StoreLost(
                f"{self._root} was emptied or replaced while it was in use: bring its files back, {FILE} among them, "
                "or restart the server, which then goes on with what is there now"
            )


def _write(file: Path, scratch: Path) -> None:
    with temporary_file(scratch) as (name, new):
        new.write(secrets.token_hex(16).encode())
        new.flush()
        os.fsync(new.fileno())
        os.rename(name, file)
    sync_directory(file.parent)
