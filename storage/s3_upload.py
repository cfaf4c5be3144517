"""One large file on its way into an S3 object, in parts that several threads send."""

import os
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from storage.s3_connections import submit
from storage.s3_errors import s3_errors
from storage.store import StoreError

PART_BYTES = 8 << 20  # so much of each part under way is in memory
_MAX_PARTS = 10_000  # S3's own limit


def upload_parts(client: Any, where: dict[str, str], content: Path, threads: Executor) -> str:
    """Store a file by multipart upload and return its ETag; the object appears when the last part is there.

    A failure aborts the upload. A process that dies leaves its parts, invisible, to the bucket's lifecycle rule
    (AbortIncompleteMultipartUpload).
    """
    with content.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        part_bytes = max(PART_BYTES, -(-size // _MAX_PARTS))
        upload = {**where, "UploadId": client.create_multipart_upload(**where)["UploadId"]}

        def send(start: int) -> dict[str, Any]:
            part = {**upload, "PartNumber": start // part_bytes + 1}
            body = os.pread(file.fileno(), part_bytes, start)
            return {"PartNumber": part["PartNumber"], "ETag": client.upload_part(**part, Body=body)["ETag"]}

        sending: list[Future[dict[str, Any]]] = []
        try:
            for start in range(0, size, part_bytes):
                sending.append(submit(threads, where, send, start))
            return _complete(client, where, upload, [part.result() for part in sending], size)
        except BaseException:
            for part in sending:
                part.cancel()
            wait(sending)  # a part that arrives after the end of its upload would stay
            with suppress(StoreError), s3_errors(where):
                client.abort_multipart_upload(**upload)
            raise


def _complete(
    client: Any, where: dict[str, str], upload: dict[str, str], parts: list[dict[str, Any]], size: int
) -> str:
    try:
        return client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})["ETag"]
    except ClientError as error:
        # Is it unknown because an earlier attempt, whose answer was lost, has completed it?
        if error.response["Error"]["Code"] != "NoSuchUpload" or not error.response["ResponseMetadata"]["RetryAttempts"]:
            raise
        found = client.head_object(**where)
        if found["ContentLength"] != size or not found["ETag"].endswith(f'-{len(parts)}"'):
            raise
        return found["ETag"]
