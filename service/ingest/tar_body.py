"""A plain tar archive of the two files, read as it arrives."""

import tarfile

from runtime.adapter_format.errors import shown
from service.errors import RequestError
from service.ingest.bundle import CONFIG, WEIGHTS, Bundle, BundleFiles

BLOCK_BYTES = 512
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


class TarBody:
    """Feeds an archive's members to `BundleFiles`; anything but the two plain files at its top is refused.

    The library's own reader needs a whole file, and follows what the archive says; this one holds one block.
    """

    def __init__(self, files: BundleFiles) -> None:
        self._files = files
        self._header = bytearray()
        self._remaining = 0  # bytes of the member that are still to come
        self._padding = 0  # and after them, up to the next block
        self._pax: bytearray | None = None  # the member is a pax header, collected here
        self._entries = 0
        self._ended = False

    def feed(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if self._remaining:
                taken = self._take_content(view[: self._remaining])
            elif self._padding:
                taken = min(self._padding, len(view))
                self._padding -= taken
            else:
                taken = min(BLOCK_BYTES - len(self._header), len(view))
                self._header += view[:taken]
                if len(self._header) == BLOCK_BYTES:
                    block, self._header = bytes(self._header), bytearray()
                    self._take_header(block)
            view = view[taken:]

    def finish(self) -> Bundle:
        if self._remaining or self._padding or self._header:
            raise _invalid("the archive is cut off")
        return self._files.bundle()

    def _take_content(self, part: memoryview) -> int:
        if self._pax is None:
            self._files.write(part)
        else:
            self._pax += part
        self._remaining -= len(part)
        if not self._remaining:
            self._end_member()
        return len(part)

    def _take_header(self, block: bytes) -> None:
        if not block.strip(b"\0"):
            self._ended = True  # archives end with blocks of zeros
            return
        if self._ended:
            raise _invalid("the archive goes on after its end")
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise _invalid(f"expected a plain tar archive, not a compressed or broken one ({error})") from None
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            raise _invalid(f"the archive has more than {MAX_ENTRIES} entries")
        if member.size < 0:
            raise _invalid(f"{shown(member.name)} has a negative size", member.name)
        self._begin_member(member)
        self._remaining, self._padding = member.size, -member.size % BLOCK_BYTES
        if not member.size:
            self._end_member()

    def _begin_member(self, member: tarfile.TarInfo) -> None:
        name = shown(member.name)
        self._pax = None
        if member.type in _PAX:
            if member.size > MAX_PAX_BYTES:
                raise _invalid(f"a pax header has more than {MAX_PAX_BYTES} bytes")
            self._pax = bytearray()
        elif member.type in _FILES:
            if member.name.startswith("/") or ".." in member.name.split("/"):
                raise _invalid(f"{name!r} leads out of the archive", name)
            self._files.begin(member.name.removeprefix("./"), member.size)
        elif member.type == tarfile.DIRTYPE and member.name.rstrip("/") == "." and not member.size:
            self._pax = bytearray()  # `tar -C DIRECTORY .` begins with this one; it holds nothing
        else:
            kind = _REFUSED.get(member.type, f"of the type {member.type!r}")
            raise _invalid(f"{name!r} is {kind}: expected {CONFIG} and {WEIGHTS} as plain files", name)

    def _end_member(self) -> None:
        if self._pax is None:
            self._files.end()
        else:
            _check_pax(bytes(self._pax))


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


def _invalid(message: str, name: str | None = None) -> RequestError:
    return RequestError("invalid_archive", message, name)
