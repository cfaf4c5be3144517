"""What things cost on one replica: seconds of a step, of an adapter's load and of K/V on the wire, from a file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TABLES = Path(__file__).parent / "costs"


class Transfer(NamedTuple):
    """Bytes that move from one place to another."""

    latency_seconds: float
    bytes_per_second: float

    def seconds(self, count: float) -> float:
        return self.latency_seconds + count / self.bytes_per_second


class StepCosts(NamedTuple):
    """Seconds of one step of the engine, as the sum of six parts."""

    by_rows: Sequence[tuple[int, float]]  # rows (tokens of all requests) and seconds, on the base without context
    decoding_row_seconds: float  # more for each row that has logits and sends a token
    adapter_row_seconds: float  # more for each row that has an adapter
    adapter_seconds: float  # more for each distinct adapter
    attended_seconds: float  # for each token that a decoding row attends to
    prompt_attended_seconds: float  # for each token that a prompt's row attends to

    def table(self, most: int) -> list[float]:
        """Return the seconds of 0 to `most` rows: straight lines between what was measured, the last one continued."""
        points = [(0, 0.0), *self.by_rows]
        table, place = [], 1
        for rows in range(most + 1):
            while place < len(points) - 1 and rows > points[place][0]:
                place += 1
            (x0, y0), (x1, y1) = points[place - 1], points[place]
            table.append(y0 + (y1 - y0) * (rows - x0) / (x1 - x0))
        return table


class Waits(NamedTuple):
    """How often a load waits for a step to end, by byte: on CPUs loads give way to steps (`runtime.background`)."""

    read: float = 0.0
    copy: float = 0.0
    longest_seconds: float = 0.1  # then it goes on beside the step


class Limits(NamedTuple):
    """What a replica has room for, by the options of `python -m service`."""

    max_running: int = 64
    max_waiting: int = 1024
    max_batch_tokens: int = 256
    device_bytes: float = 2**30  # of adapters
    host_bytes: float = 2**31
    disk_bytes: float = 2**33
    kv_bytes: float = 2**29


class Costs(NamedTuple):
    """The costs of one replica, and where they come from."""

    about: str
    measured: bool  # on an engine; else they are assumptions
    conditions: Sequence[str]
    steps: StepCosts  # while nothing else computes on the machine
    beside: StepCosts | None  # while another replica on the same machine computes; None: there is none
    request_seconds: float  # of a request outside the engine, before its first token arrives
    loads_at_once: int  # loads from disk or the store that go on at one time
    copy: Transfer  # an adapter from host to device memory
    read: Transfer  # from disk to host memory: read, verified and packed
    download: Transfer  # from the store to the disk
    kv_bytes_per_token: float
    adapter_bytes: float  # of a typical adapter in memory
    limits: Limits
    waits: Waits = Waits()


def read(name: str | Path) -> Costs:
    """Read a table by its name in `costs/`, or from a path. Raises ValueError with the field that is wrong."""
    path = TABLES / f"{name}.json" if not str(name).endswith(".json") else Path(name)
    if not path.exists():
        known = ", ".join(sorted(each.stem for each in TABLES.glob("*.json")))
        raise ValueError(f"there is no table of costs {str(path)!r}: name a file, or one of {known}")
    try:
        return parse(json.loads(path.read_text()))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: a table of costs needs {error}; loadtests.simulate.calibrate writes one") from None


def parse(fields: Mapping[str, Any]) -> Costs:
    return Costs(
        about=fields["about"],
        measured=fields["measured"],
        conditions=fields["conditions"],
        steps=_steps(fields["steps"]),
        beside=_steps(fields["beside"]) if fields.get("beside") else None,
        request_seconds=fields["request_seconds"],
        loads_at_once=fields["loads_at_once"],
        copy=Transfer(**fields["copy"]),
        read=Transfer(**fields["read"]),
        download=Transfer(**fields["download"]),
        kv_bytes_per_token=fields["kv_bytes_per_token"],
        adapter_bytes=fields["adapter_bytes"],
        limits=Limits(**fields["limits"]),
        waits=Waits(**fields.get("waits", {})),
    )


def as_fields(costs: Costs) -> dict[str, Any]:
    """Return what `parse` reads."""
    fields = costs._asdict()
    for name in ("steps", "beside", "copy", "read", "download", "limits", "waits"):
        fields[name] = None if fields[name] is None else fields[name]._asdict()
    return fields


def _steps(fields: Mapping[str, Any]) -> StepCosts:
    return StepCosts(**{**fields, "by_rows": [(rows, seconds) for rows, seconds in fields["by_rows"]]})
