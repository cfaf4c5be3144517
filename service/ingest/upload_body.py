"""Reading an uploaded adapter from a request's body: multipart, tar, tar.gz, or one safetensors file."""

from pathlib import Path

from python_multipart.multipart import parse_options_header

from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.safetensors_header import read_header
from service.errors import RequestError
from service.ingest.body_reader import BodyReader
from service.ingest.bundle import CONFIG, LIMITS, WEIGHTS, Bundle, BundleFiles, too_large
from service.ingest.gzip_body import GzipBody
from service.ingest.multipart_body import read_multipart
from service.ingest.tar_body import read_tar

ACCEPTED = "multipart/form-data, application/x-tar, application/gzip (a tar.gz) or application/vnd.safetensors"
_TAR = (b"application/x-tar", b"application/tar")
_COMPRESSED = (b"application/gzip", b"application/x-gzip", b"application/x-tgz", b"application/x-gtar-compressed")


def read_bundle(body: BodyReader, directory: Path) -> Bundle:
    """Read a body into `directory`, which the caller removes in any case. Blocks.

    Raises RequestError: `unsupported_media_type`, `body_too_large`, or an error of the container format; InvalidAdapter
    for a safetensors body without a configuration, and as `BodyReader.read` and
    `BundleFiles.bundle` do.
    """
    announced = body.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > body.max_bytes:
        raise too_large(body.max_bytes)
    files = BundleFiles(directory, body.max_bytes)
    content_type, options = parse_options_header(body.headers.get("content-type"))
    try:
        if content_type == b"multipart/form-data":
            read_multipart(body, files, options.get(b"boundary", b""))
        elif content_type in _TAR:
            read_tar(body, files)
        elif content_type in _COMPRESSED:
            read_tar(GzipBody(body), files)
        elif content_type == b"application/vnd.safetensors":
            _read_safetensors(body, files, directory)
        else:
            message = f"the content type {content_type.decode('latin-1')!r} is not accepted: expected {ACCEPTED}"
            raise RequestError("unsupported_media_type", message, "Content-Type")
        return files.bundle()
    finally:
        files.close()


def _read_safetensors(body: BodyReader, files: BundleFiles, directory: Path) -> None:
    """The weights alone, with the configuration in the file's metadata."""
    files.begin(WEIGHTS)
    while data := body.read():
        files.write(data)
    files.end()
    with (directory / WEIGHTS).open("rb") as file:
        config = read_header(file).metadata.get("adapter_config")
    if config is None:
        raise InvalidAdapter(
            "__metadata__", f'has no "adapter_config", expected the JSON of {CONFIG}', "send both files as a form"
        )
    content = config.encode()
    if len(content) > LIMITS[CONFIG]:
        raise too_large(LIMITS[CONFIG], CONFIG)
    files.begin(CONFIG)
    files.write(content)
    files.end()
