"""An S3 endpoint for a measurement: a given one, or moto's server on loopback."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import boto3
import httpx
from botocore.config import Config

from loadtests.server_process import ServerFailed

START_SECONDS = 60
# For moto, which accepts any credentials; no real account has these
CREDENTIALS = {"aws_access_key_id": "an-id", "aws_secret_access_key": "a-secret"}
REGION = "us-east-1"


class Endpoint(NamedTuple):
    """An S3 endpoint and how to use it."""

    url: str
    environment: dict[str, str]  # variables that a server needs to use it

    def client(self) -> Any:
        """Return a client of boto3, with the credentials that a server would use."""
        names = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
        given = {key: self.environment[name] for key, name in names.items() if name in self.environment}
        region = self.environment["AWS_DEFAULT_REGION"]
        checksums = Config(response_checksum_validation="when_required")
        return boto3.session.Session(region_name=region, **given).client("s3", endpoint_url=self.url, config=checksums)


@contextmanager
def s3_endpoint(url: str | None) -> Iterator[Endpoint]:
    """Yield the endpoint at a URL, with the environment's credentials; None starts moto. Raises ServerFailed."""
    if url is not None:
        yield Endpoint(url, environment_for(url))
        return
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_it_answers(process, url)
        yield Endpoint(url, environment_for(url) | {name.upper(): value for name, value in CREDENTIALS.items()})
    finally:
        process.terminate()
        process.wait(timeout=60)


def environment_for(url: str) -> dict[str, str]:
    region = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION") or REGION
    return {"AWS_ENDPOINT_URL_S3": url, "AWS_DEFAULT_REGION": region, "AWS_EC2_METADATA_DISABLED": "true"}


def wait_until_it_answers(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(url)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise ServerFailed(f"moto's server did not answer at {url}")
