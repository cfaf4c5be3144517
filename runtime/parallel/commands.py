"""What rank 0 tells the other ranks, in order, and what they report.

All ranks have blocks, slots and extents of the same sizes at the same places, so rank 0's numbers hold everywhere.
"""

from typing import Literal

import msgspec

from runtime.config import EngineConfig


class Start(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The first command."""

    config: EngineConfig
    rank: int
    store: str  # the path of a file by which the ranks find each other


class Row(msgspec.Struct, array_like=True, frozen=True):
    """The part of one request that a step computes."""

    token_ids: list[int]
    start: int  # the position of the first of them
    blocks: list[int]  # of the request, up to those of these tokens
    known: int  # the tokens of the request
    samples: bool
    num_prompt: int
    unscored: int  # see runtime.request.Request
    adapter: str | None  # digest
    invocation_start: int


class Step(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Compute a step: all its integers."""

    rows: list[Row]  # in rank 0's order
    copies: list[tuple[int, int]]  # blocks to copy before it, each to another
    places: dict[str, int]  # the element of device memory at which each adapter of the step begins


class Fill(msgspec.Struct, tag=True, array_like=True, frozen=True, kw_only=True):
    """Pack this rank's part of an adapter, copy it to another tier, or both; answered by Done."""

    ticket: int = 0
    digest: str
    path: str | None  # of the canonical file
    file: bytes | None  # all of it, where there is no path; without either the adapter is copied only
    first: int  # the element at which it begins, of host memory, or of the tier that it is copied from
    count: int  # elements
    into: Literal["host", "device"] | None  # the tier that it is copied to
    target: int  # the element of that tier


class Offload(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Copy a block to a slot of host memory."""

    block: int
    slot: int


class AwaitOffloads(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Go on when these blocks have been copied: the next step overwrites them."""

    blocks: list[int]


class Reload(msgspec.Struct, tag=True, array_like=True, frozen=True, kw_only=True):
    """Copy slots to blocks; answered by Done."""

    ticket: int = 0
    slots: list[int]
    blocks: list[int]


class Joining(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The process runs, and joins the group now."""


class Ready(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The model is loaded, and a step can be computed."""


class Done(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """What a command with a ticket asked for is done, or cannot be."""

    ticket: int
    fault: str = ""  # why it cannot
    kind: str = ""  # the class of the error


class Failed(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The process ends."""

    reason: str
    group: bool = False  # a call of all ranks failed: another one may have ended before


Command = Start | Step | Fill | Offload | AwaitOffloads | Reload
Report = Joining | Ready | Done | Failed

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
