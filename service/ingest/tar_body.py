"""A tar archive of the files, plain or compressed with gzip."""

import tarfile
from typing import Protocol

from runtime.adapter_format.errors import shown
from service.errors import RequestError
from service.ingest.bundle import CONFIG, OPTIONAL, REQUIRED, WEIGHTS, BundleFiles

MAX_ENTRIES = 1000  # the folder of a training run has hundreds at most
MAX_PAX_BYTES = 64 * 1024
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE)
_PATH = b"path"  # the pax field of a long name
_HARMLESS_PAX = (
    b"mtime",
    b"atime",
    b"ctime",
    b"uname",
    b"gname",
    b"uid",
    b"gid",
    b"comment",
    b"LIBARCHIVE.",
    b"SCHILY.",
)
_WITHOUT_DATA = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a directory",
}


class Bytes(Protocol):
    """Where the archive comes from: the body, or what it expands to."""

    def read(self, max_bytes: int, /) -> memoryview: ...


def read_tar(body: Bytes, files: BundleFiles) -> None:
    """Read an archive's members. Other files than a bundle's are ignored. Blocks. Raises RequestError.

    The bundle may lie in a folder; of several, the one that lies least deep counts, so that the checkpoints below a
    run's folder are not taken for its result.

    `tarfile` parses the headers only. Its stream mode (`tarfile.open(mode="r|")`) is not safe for a stranger's archive:
    it holds pax headers and long names of any size in memory, applies them, and takes a broken header for the end.
    """
    entries, folder, long_name = 0, _Folder(files), ""
    while (block := _read_block(body)).strip(b"\0"):
        entries += 1
        if entries > MAX_ENTRIES:
            raise _invalid(f"the archive has more than {MAX_ENTRIES} entries: pack {CONFIG} and {WEIGHTS} alone")
        member = _parsed(block)
        if member.type in _PAX or member.type == tarfile.GNUTYPE_LONGNAME:
            long_name = _long_name(member, body) or long_name
        else:
            _read_member(body, folder, member, long_name or member.name)
            long_name = ""
        _read(body, -member.size % tarfile.BLOCKSIZE)  # padding
    while block:  # zeros: the end of the archive
        block = _read_block(body)
        if block.strip(b"\0"):
            raise _invalid("the archive goes on after its end")


class _Folder:
    """Takes the files of one folder of the archive."""

    def __init__(self, files: BundleFiles) -> None:
        self._files = files
        self._path: list[str] | None = None
        self._is_certain = False  # one of its files is a required one

    def begin(self, path: str, size: int) -> None:
        """Begin a file, which is ignored unless it belongs to the bundle."""
        *folder, name = [part for part in path.split("/") if part != "."] or [""]
        self._files.begin(name if self._takes(folder, name) else f"./{path}", size)

    def end(self) -> None:
        self._files.end()

    def write(self, data: memoryview) -> None:
        self._files.write(data)

    def _takes(self, folder: list[str], name: str) -> bool:
        if name not in (*REQUIRED, *OPTIONAL) or (self._is_certain and name in OPTIONAL and folder != self._path):
            return False
        if self._path is None or (name in REQUIRED and (not self._is_certain or len(folder) < len(self._path))):
            if folder != self._path:
                self._files.forget()
            self._path = folder
        elif folder != self._path and name in REQUIRED and len(folder) == len(self._path):
            both = " and ".join(shown("/".join(each) or ".") for each in (self._path, folder))
            raise _invalid(f"the folders {both} both have adapters: pack one of them", shown(name))
        self._is_certain |= name in REQUIRED and folder == self._path
        return folder == self._path


def _read_member(body: Bytes, folder: _Folder, member: tarfile.TarInfo, path: str) -> None:
    if path.startswith("/") or ".." in path.split("/"):
        raise _invalid(f"{shown(path)!r} leads out of the archive: pack with paths below one folder", shown(path))
    if member.type in _FILES:
        folder.begin(path, member.size)
        remaining = member.size
        while remaining:
            if not (data := body.read(remaining)):
                raise _cut_off()
            folder.write(data)
            remaining -= len(data)
        folder.end()
        return
    kind = _WITHOUT_DATA.get(member.type)
    if kind is None or member.size:
        raise _invalid(f"{shown(path)!r} is of the type {member.type!r}: expected plain files", shown(path))
    if path.rstrip("/").rpartition("/")[2] in (*REQUIRED, *OPTIONAL):
        way = "pack what it leads to (tar --dereference)" if "link" in kind else f"expected {CONFIG} and {WEIGHTS}"
        raise _invalid(f"{shown(path)!r} is {kind}, not a plain file: {way}", shown(path))


def _long_name(member: tarfile.TarInfo, body: Bytes) -> str:
    """The name that a pax or GNU header gives to the next member, if it gives one."""
    if member.size > MAX_PAX_BYTES:
        raise _invalid(f"a pax header or a long name has more than {MAX_PAX_BYTES} bytes")
    content = _read(body, member.size)
    if member.type == tarfile.GNUTYPE_LONGNAME:
        return content.rstrip(b"\0").decode("utf-8", "replace")
    name = _checked_pax(content).get(_PATH, b"") if member.type == tarfile.XHDTYPE else b""
    return name.decode("utf-8", "replace")


def _read_block(body: Bytes) -> bytes:
    """A block, empty at the end of the body."""
    if not (start := bytes(body.read(tarfile.BLOCKSIZE))):
        return b""
    return start + _read(body, tarfile.BLOCKSIZE - len(start))


def _read(body: Bytes, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        if not (data := body.read(size - len(content))):
            raise _cut_off()
        content += data
    return bytes(content)


def _parsed(block: bytes) -> tarfile.TarInfo:
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if block.startswith(b"PK\x03\x04"):
            raise _invalid("the body is a zip archive: pack the files with tar, or send them as a form") from None
        if block.startswith(b"\x1f\x8b"):
            raise _invalid("the archive is compressed: send it with Content-Type: application/gzip") from None
        raise _invalid(f"expected a tar archive, plain or with gzip: {error}") from None
    if member.size < 0:
        raise _invalid(f"{shown(member.name)} has a negative size", member.name)
    return member


def _checked_pax(records: bytes) -> dict[bytes, bytes]:
    """Read pax records, and refuse those that would change a member's size or kind: the plain header decides."""
    found = {}
    while records:
        length, _, _ = records.partition(b" ")
        if not length.isdigit() or not len(length) + 1 < int(length) <= len(records):
            raise _invalid("a pax header is broken")
        key, _, value = records[len(length) + 1 : int(length)].partition(b"=")
        if key != _PATH and not key.startswith(_HARMLESS_PAX):
            raise _invalid(f"the pax field {shown(key.decode('latin-1'))!r} is not accepted")
        found[key] = value.removesuffix(b"\n")
        records = records[int(length) :]
    return found


def _cut_off() -> RequestError:
    return _invalid("the archive is cut off, or is none: expected a whole tar archive, plain or with gzip")


def _invalid(message: str, name: str | None = None) -> RequestError:
    return RequestError("invalid_archive", message, name)
