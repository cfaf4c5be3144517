"""A multipart form of the files."""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import RequestError
from service.ingest.body_reader import BodyReader
from service.ingest.bundle import OPTIONAL, REQUIRED, BundleFiles

NAMES = frozenset((*REQUIRED, *OPTIONAL))


def read_multipart(body: BodyReader, files: BundleFiles, boundary: bytes) -> None:
    """Read a form's parts, each named by its file, whatever its folder, or else by its field. Blocks.

    Parts of other names are ignored. Raises RequestError.
    """
    if not boundary:
        message = (
            "the content type names no boundary: expected multipart/form-data; boundary=…, as HTTP clients write it"
        )
        raise RequestError("invalid_multipart", message, "Content-Type")
    form = _Form(files)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": form.on_part_begin,
                "on_header_field": form.on_header_field,
                "on_header_value": form.on_header_value,
                "on_header_end": form.on_header_end,
                "on_headers_finished": form.on_headers_finished,
                "on_part_data": form.on_part_data,
                "on_part_end": files.end,
                "on_end": form.on_end,
            },
        )
        while data := body.read():
            parser.write(bytes(data))
    except FormParserError as error:
        raise _invalid(str(error)) from None
    if not form.ended:
        raise _invalid("the form is cut off: its last boundary is missing")


class _Form:
    """What the parser calls."""

    def __init__(self, files: BundleFiles) -> None:
        self.ended = False
        self._files = files
        self._field, self._value = bytearray(), bytearray()  # of the header that is being read
        self._disposition = b""  # of the part that is being read

    def on_part_begin(self) -> None:
        self._disposition = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        field, value = self._field.lower(), bytes(self._value)
        if field == b"content-disposition":
            self._disposition = value
        if field == b"content-transfer-encoding" and value.strip().lower() not in (b"binary", b"7bit", b"8bit"):
            raise _invalid(f"the transfer encoding {value!r} is not accepted: expected binary")
        self._field, self._value = bytearray(), bytearray()

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        field, path = (options.get(key, b"").decode("utf-8", "replace") for key in (b"name", b"filename"))
        file = path.rpartition("/")[2]
        if field != file and {field, file} <= NAMES:
            raise _invalid(f"the part {field} holds the file {file}", field)
        self._files.begin(file if file in NAMES or field not in NAMES else field)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._files.write(memoryview(data)[start:end])

    def on_end(self) -> None:
        self.ended = True


def _invalid(message: str, name: str | None = None) -> RequestError:
    return RequestError("invalid_multipart", message, name)
