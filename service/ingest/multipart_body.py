"""A multipart form with the two files, read as it arrives."""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import RequestError
from service.ingest.bundle import CONFIG, WEIGHTS, Bundle, BundleFiles


class MultipartBody:
    """Feeds a form's parts to `BundleFiles`, each named by its file name, or else by its field."""

    def __init__(self, files: BundleFiles, boundary: bytes) -> None:
        self._files = files
        self._field, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._ended = False
        if not boundary:
            raise _invalid("the content type names no boundary")
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": files.end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise _invalid(str(error)) from None

    def feed(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _invalid(str(error)) from None

    def finish(self) -> Bundle:
        if not self._ended:
            raise _invalid("the form is cut off: its last boundary is missing")
        return self._files.bundle()

    def _on_part_begin(self) -> None:
        self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        field, value = self._field.lower(), bytes(self._value)
        if field == b"content-disposition":
            self._disposition = value
        if field == b"content-transfer-encoding" and value.strip().lower() not in (b"binary", b"7bit", b"8bit"):
            raise _invalid(f"the transfer encoding {value!r} is not accepted: expected binary")
        self._field, self._value = bytearray(), bytearray()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        field, file = (options.get(key, b"").decode("utf-8", "replace") for key in (b"name", b"filename"))
        if {field, file} == {CONFIG, WEIGHTS}:
            raise _invalid(f"the part {field} holds the file {file}", field)
        self._files.begin(file if file in (CONFIG, WEIGHTS) else field)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._files.write(memoryview(data)[start:end])

    def _on_end(self) -> None:
        self._ended = True


def _invalid(message: str, name: str | None = None) -> RequestError:
    return RequestError("invalid_multipart", message, name)
