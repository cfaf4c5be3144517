"""A plain tar archive of the files."""

import tarfile

from runtime.adapter_format.errors import shown
from service.errors import RequestError
from service.ingest.body_reader import BodyReader
from service.ingest.bundle import CONFIG, WEIGHTS, BundleFiles

MAX_ENTRIES = 16
MAX_PAX_BYTES = 64 * 1024
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE)
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
_REFUSED = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a directory",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


def read_tar(body: BodyReader, files: BundleFiles) -> None:
    """Read an archive's members; only the plain files at its top are accepted. Blocks. Raises RequestError.

    `tarfile` parses the headers only. Its stream mode (`tarfile.open(mode="r|")`) is not safe for a stranger's archive:
    it holds pax headers and long names of any size in memory, applies them, and takes a broken header for the end.
    """
    entries = 0
    while (block := _read_block(body)).strip(b"\0"):
        entries += 1
        if entries > MAX_ENTRIES:
            raise _invalid(f"the archive has more than {MAX_ENTRIES} entries")
        _read_member(body, files, _parsed(block))
    while block:  # zeros: the end of the archive
        block = _read_block(body)
        if block.strip(b"\0"):
            raise _invalid("the archive goes on after its end")


def _read_member(body: BodyReader, files: BundleFiles, member: tarfile.TarInfo) -> None:
    name = shown(member.name)
    if member.type in _PAX:
        if member.size > MAX_PAX_BYTES:
            raise _invalid(f"a pax header has more than {MAX_PAX_BYTES} bytes")
        _check_pax(_read(body, member.size))
    elif member.type in _FILES:
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise _invalid(f"{name!r} leads out of the archive", name)
        files.begin(member.name.removeprefix("./"), member.size)
        remaining = member.size
        while remaining:
            if not (data := body.read(remaining)):
                raise _cut_off()
            files.write(data)
            remaining -= len(data)
        files.end()
    # `tar -C DIRECTORY .` begins with an empty entry for the directory
    elif member.type != tarfile.DIRTYPE or member.name.rstrip("/") != "." or member.size:
        kind = _REFUSED.get(member.type, f"of the type {member.type!r}")
        raise _invalid(f"{name!r} is {kind}: expected {CONFIG} and {WEIGHTS} as plain files", name)
    _read(body, -member.size % tarfile.BLOCKSIZE)  # padding


def _read_block(body: BodyReader) -> bytes:
    """A block, empty at the end of the body."""
    if not (start := bytes(body.read(tarfile.BLOCKSIZE))):
        return b""
    return start + _read(body, tarfile.BLOCKSIZE - len(start))


def _read(body: BodyReader, size: int) -> bytes:
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
        raise _invalid(f"expected a plain tar archive, not a compressed or broken one ({error})") from None
    if member.size < 0:
        raise _invalid(f"{shown(member.name)} has a negative size", member.name)
    return member


def _check_pax(records: bytes) -> None:
    """Refuse pax records that would change a member's name, size or kind: the plain header alone decides."""
    while records:
        length, _, _ = records.partition(b" ")
        if not length.isdigit() or not len(length) + 1 < int(length) <= len(records):
            raise _invalid("a pax header is broken")
        key, _, _ = records[len(length) + 1 : int(length)].partition(b"=")
        if not key.startswith(_HARMLESS_PAX):
            raise _invalid(f"the pax field {shown(key.decode('latin-1'))!r} is not accepted")
        records = records[int(length) :]


def _cut_off() -> RequestError:
    return _invalid("the archive is cut off")


def _invalid(message: str, name: str | None = None) -> RequestError:
    return RequestError("invalid_archive", message, name)
