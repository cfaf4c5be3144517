"""A source that is a directory of the server. Links are followed inside the allowed root, and never out of it."""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from service.errors import RequestError
from service.ingest.bundle import OPTIONAL, REQUIRED, WEIGHTS, BundleFiles, hint
from storage.store import OnProgress

_COPY_BYTES = 1 << 20
_MAX_LINKS = 40  # on the way to one file, as Linux allows
# Nothing is opened through a link, and no open waits for the writer of a pipe
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


def copy_files(root: Path, below: Sequence[str], files: BundleFiles, on_progress: OnProgress) -> None:
    """Copy the files of a directory, so that they cannot change while they are checked. Blocks.

    `below` are the names that lead from `root` to the directory. Raises RequestError: what leads out of the root,
    missing files, files over their limits, a directory that changes meanwhile; and what `on_progress` raises.
    """
    with ExitStack() as stack:
        tree = stack.enter_context(_opened(root))
        present = set(os.listdir(stack.enter_context(_directory(tree, below))))
        names = [name for name in (*OPTIONAL, *REQUIRED) if name in present or name in REQUIRED]
        opened = {name: stack.enter_context(_open_plain(tree, below, name, present)) for name in names}
        # Kubernetes replaces a mounted volume by turning one link: the files must not come from two versions of it
        for name, file in opened.items():
            with _open_plain(tree, below, name, present) as again:
                if not os.path.samestat(os.fstat(again.fileno()), os.fstat(file.fileno())):
                    message = f"{name} of the source was replaced while it was opened: try again"
                    raise RequestError("source_changed", message, "src")
        for name, file in opened.items():
            _copy(name, file, files, on_progress)


def _copy(name: str, file: BinaryIO, files: BundleFiles, on_progress: OnProgress) -> None:
    size, done = os.fstat(file.fileno()).st_size, 0
    files.begin(name, size)
    while chunk := file.read(_COPY_BYTES):
        files.write(chunk)
        done += len(chunk)
        if name == WEIGHTS:
            on_progress(done, max(done, size))
    files.end()


class _Tree:
    """Opens what lies below a root, by the rules of a path lookup in which the root is all there is.

    Each part of a path is opened in the directory that was opened before it, so that nobody who renames or links
    meanwhile can lead the way out.
    """

    def __init__(self, root: Path, descriptor: int) -> None:
        # A link may be absolute: it names the root as the server's operator does, or by its real path
        self._names = {root.parts, root.resolve().parts}
        self._root = descriptor

    def open(self, path: Sequence[str]) -> int:
        """Open a file or a directory to read. Raises OSError; PermissionError for what leads out of the root."""
        pending, links = [*reversed(path)], 0
        descriptors = [os.dup(self._root)]
        try:
            while pending:
                part = pending.pop()
                if part in ("", "."):
                    continue
                if part == "..":
                    if len(descriptors) == 1:
                        raise _leads_out()
                    os.close(descriptors.pop())
                elif (target := _link(part, descriptors[-1])) is None:
                    descriptors.append(os.open(part, _OPEN, dir_fd=descriptors[-1]))
                else:
                    links += 1
                    if links > _MAX_LINKS:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                    if target.startswith("/"):
                        target = self._below(target)
                        while len(descriptors) > 1:
                            os.close(descriptors.pop())
                    pending += reversed(target.split("/"))
            return descriptors.pop()
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _below(self, target: str) -> str:
        """An absolute path as one from the root."""
        parts = Path(target).parts
        for names in self._names:
            if parts[: len(names)] == names:
                return "/".join(parts[len(names) :])
        raise _leads_out()


def _link(name: str, directory: int) -> str | None:
    """Where a link leads; None for what is none."""
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


def _leads_out() -> PermissionError:
    return PermissionError(errno.EXDEV, "a link leads out of what the server allows (--allow-source)")


@contextmanager
def _opened(root: Path) -> Iterator[_Tree]:
    try:
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise RequestError("source_not_found", f"the allowed directory is gone: {error.strerror}", "src") from None
    try:
        yield _Tree(root, descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _directory(tree: _Tree, below: Sequence[str]) -> Iterator[int]:
    try:
        descriptor = tree.open(below)
    except FileNotFoundError:
        raise RequestError("source_not_found", "the directory of the source does not exist", "src") from None
    except OSError as error:
        message = f"the source is not a directory that the server may read: {error.strerror}"
        raise RequestError("source_not_allowed", message, "src") from None
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            message = "the source is a file: name the directory that it is in"
            raise RequestError("source_not_allowed", message, "src")
        yield descriptor
    finally:
        os.close(descriptor)


def _open_plain(tree: _Tree, below: Sequence[str], name: str, present: set[str]) -> BinaryIO:
    try:
        descriptor = tree.open([*below, name])
    except FileNotFoundError:
        raise RequestError("source_not_found", f"the source has no {name}{hint(name, present)}", "src") from None
    except OSError as error:
        raise RequestError("source_not_allowed", f"{name} of the source: {error.strerror}", "src") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RequestError("source_not_allowed", f"{name} of the source is not a plain file", "src")
    return open(descriptor, "rb")
