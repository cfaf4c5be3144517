"""Buckets that the tests make and remove again."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_numbers = itertools.count()


@contextmanager
def new_bucket(client: Any) -> Iterator[str]:
    """A bucket that is there for the length of the block."""
    name = f"rootstock-{os.getpid()}-{next(_numbers)}"
    client.create_bucket(Bucket=name)
    yield name
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
        for found in page.get("Contents", ()):
            client.delete_object(Bucket=name, Key=found["Key"])
    client.delete_bucket(Bucket=name)
