"""Bundles that lie where the server can read them: `file://` below an allowed directory."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from service.bundle import CONFIG, WEIGHTS, Bundle, BundleFiles
from service.responses import ApiError

_COPY_BYTES = 1 << 20
_NOT_BUILT = ("s3", "hf")


def copy_bundle(src: str, roots: Sequence[Path], directory: Path, max_bytes: int) -> Bundle:
    """Copy the two files that `src` names into `directory`, so that nobody changes them while they are checked.

    Blocks. Raises ApiError: 400 for another kind of source, 403 outside the allowed roots and for links, 404
    for what is not there, 413 past the limits.
    """
    source = _source_directory(src, roots)
    files = BundleFiles(directory, max_bytes)
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise ApiError(404, "source_not_found", f"{src}: {error.strerror}", "src") from None
    try:
        for name in (CONFIG, WEIGHTS):
            with _open_plain(name, descriptor) as file:
                files.begin(name)
                while chunk := file.read(_COPY_BYTES):
                    files.write(chunk)
                files.end()
    finally:
        files.close()
        os.close(descriptor)
    return files.bundle()


def _source_directory(src: str, roots: Sequence[Path]) -> Path:
    try:
        url = urlsplit(src)
    except ValueError:
        raise ApiError(400, "unsupported_source", "src is not a URL", "src") from None
    if url.scheme in _NOT_BUILT:
        message = f"{url.scheme}:// sources are not built yet: upload the files, or give file:///path"
        raise ApiError(400, "unsupported_source", message, "src")
    path = unquote(url.path)
    if url.scheme != "file" or url.netloc not in ("", "localhost") or url.query or url.fragment or "\0" in path:
        raise ApiError(400, "unsupported_source", "src must be file:///path of a directory on the server", "src")
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(os.path.realpath(root)) for root in roots):
        message = f"{src} is not below a directory that --file-root allows"
        raise ApiError(403, "source_not_allowed", message, "src")
    return real


def _open_plain(name: str, directory: int) -> BinaryIO:
    """Open a file of a bundle, never through a link, and without waiting for the far end of a pipe."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except FileNotFoundError:
        raise ApiError(404, "source_not_found", f"the source has no {name}", "src") from None
    except OSError as error:
        raise ApiError(403, "source_not_allowed", f"{name} of the source: {error.strerror}", "src") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ApiError(403, "source_not_allowed", f"{name} of the source is not a plain file", "src")
    return open(descriptor, "rb")
