"""Turns an untrusted LoRA adapter into its canonical file: checked bytes with one digest.

An adapter either applies exactly as PEFT would apply it, or is refused with an error that names the tensor
or the field. Adapters of the same maths have the same canonical bytes: names are normalised and sorted, the
configuration is reduced to each module's scale and the aLoRA invocation, and tensors keep their dtype and bits.
"""

import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import msgspec
import numpy as np
from blake3 import blake3

from runtime.adapter_format.base_names import base_warnings, check_base_class
from runtime.adapter_format.base_tensors import BaseTensor
from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.peft_config import PeftConfig, parse_peft_config
from runtime.adapter_format.safetensors_header import (
    FILE,
    MAX_HEADER_BYTES,
    Header,
    consecutive,
    header_in,
    read_header,
    write_header,
)
from runtime.adapter_format.tensor_source import CHUNK_BYTES, ArrayTensors, FileTensors
from runtime.adapter_format.tensors import AdapterTensors, module_of
from runtime.models.config import ModelConfig

CONFIG_KEY = "adapter_config"
_log = logging.getLogger(__name__)


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The configuration in a canonical file. What is at its default is not written: digests stay what they were."""

    alora_invocation_tokens: tuple[int, ...] | None  # None for a plain LoRA
    scales: dict[str, float]  # of every module with A and B, by its name
    token_indices: dict[str, tuple[int, ...]] = {}  # rows of the embedding or the head that are replaced, by module


class CanonicalFile(NamedTuple):
    """A canonical file in memory."""

    config: AdapterConfig
    header: Header
    data: np.ndarray  # the whole file, uint8
    names: Mapping[str, str] = {}  # of tensors that were in memory: by name in the file, their own


class AdapterSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Describes a canonical adapter to the catalog."""

    digest: str  # BLAKE3 of the file, in hex
    rank: int  # the largest of all modules; 0 for IA³
    targets: list[str]  # short module names, such as q_proj
    kind: Literal["lora", "alora"]
    bytes: int  # the file's size
    warnings: list[str]
    invocation_tokens: tuple[int, ...] | None
    kv_is_base: bool  # K and V under the adapter equal the base's, so its whole K/V can be shared with the base


def canonicalise(
    weights: Path,
    config: bytes,
    model: ModelConfig,
    target: Path,
    *,
    max_rank: int,
    base_model_names: Sequence[str] = (),
    strict: bool = False,
    base_tensor: BaseTensor | None = None,
    pause: Callable[[], None] = lambda: None,
) -> AdapterSummary:
    """Check an adapter completely and write its canonical file at `target`.

    The header and the configuration are checked before any data is read; the data is scanned while it is
    copied. `base_model_names` are the names of this server's base: a different name in the configuration is a
    warning, or an error if `strict`. `base_tensor` reads the base's own tensors, because an adapter may hold
    equal copies of them. `pause` is called before each piece of work, of a few milliseconds.
    Raises InvalidAdapter, and then leaves no file at `target`.
    """
    peft = parse_peft_config(config, max_rank=max_rank, vocab_size=model.vocab_size)
    check_base_class(peft.base_class, model.architecture)
    about_base = base_warnings(peft.base_model_name_or_path, base_model_names, strict=strict)
    unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with weights.open("rb") as source, unfinished.open("xb") as out:
            pause()
            adapter = AdapterTensors(FileTensors(source), peft, model, base_tensor)
            digest, size = _write_canonical(adapter, _head(adapter, peft).text, out, pause)
            out.flush()
            os.fsync(out.fileno())
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return AdapterSummary(
        digest=digest,
        rank=max(adapter.ranks.values(), default=0),
        targets=sorted({module.rpartition(".")[2] for module in changed_modules(adapter.tensors)}),
        kind="lora" if peft.alora_invocation_tokens is None else "alora",
        bytes=size,
        warnings=[*peft.warnings, *about_base, *adapter.warnings],
        invocation_tokens=peft.alora_invocation_tokens,
        kv_is_base=kv_is_base(adapter.tensors, model),
    )


def _new_memory(size: int) -> np.ndarray:
    return np.empty(size, np.uint8)


def canonical_from_tensors(
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    model: ModelConfig,
    *,
    max_rank: int,
    base_tensor: BaseTensor | None = None,
    memory: Callable[[int], np.ndarray] = _new_memory,
    pause: Callable[[], None] | None = None,
) -> tuple[str, CanonicalFile]:
    """Return the digest and the canonical file of an adapter in memory, equal to those of `canonicalise`.

    Arrays are float32, float16, or uint16 for the bits of bfloat16. `memory` allocates the given number of bytes for
    the file. `pause` is called before each piece of work, of about a millisecond, all of which is then this thread's;
    without it, the digest is computed on every core at once. Warnings are logged. Raises InvalidAdapter.
    """
    peft = parse_peft_config(config, max_rank=max_rank, vocab_size=model.vocab_size)
    check_base_class(peft.base_class, model.architecture)
    adapter = AdapterTensors(ArrayTensors(tensors), peft, model, base_tensor)
    for warning in (*peft.warnings, *adapter.warnings):
        _log.warning("an adapter from memory: %s", warning)
    head = _head(adapter, peft)
    end = head.header.data_offset
    data = memory(end + sum(entry.stop - entry.start for entry in adapter.tensors.values()))
    data[:end] = np.frombuffer(head.text, np.uint8)
    digest = blake3(head.text)
    for name in adapter.tensors:
        for chunk in adapter.finite_chunks(name):
            if pause is not None:
                pause()
                digest.update(chunk)
            start, end = end, end + len(chunk)
            data[start:end] = chunk
    if pause is None:  # the caller waits for the digest and computes nothing else
        digest = blake3(data.data, max_threads=blake3.AUTO)
    return digest.hexdigest(), CanonicalFile(head.config, head.header, data, adapter.own_names)


def read_canonical(source: Path | bytes | memoryview) -> tuple[AdapterConfig, Header, int]:
    """Return the configuration, the header and the data's offset in bytes of a canonical file.

    Raises InvalidAdapter for any other file.
    """
    if isinstance(source, Path):
        with source.open("rb") as file:
            header = read_header(file)
    else:
        header = header_in(memoryview(source))
    try:
        config = msgspec.json.decode(header.metadata[CONFIG_KEY], type=AdapterConfig)
    except (KeyError, msgspec.DecodeError) as error:
        raise InvalidAdapter(f"__metadata__.{CONFIG_KEY}", f"is not canonical: {error}") from None
    return config, header, header.data_offset


def changed_modules(tensors: Iterable[str]) -> set[str]:
    """Return the modules to which a canonical file's tensors belong."""
    return set(map(module_of, tensors))


def kv_is_base(tensors: Iterable[str], model: ModelConfig) -> bool:
    """Return whether an adapter of these canonical tensors leaves every K and V equal to the base's.

    K and V of a layer depend on the hidden state before it, and so on earlier layers and the embedding. The modules
    after the last layer's K and V change none.
    """
    last = f"model.layers.{model.num_layers - 1}."
    blocks = () if model.experts is None else model.experts.names.blocks
    within = ("self_attn.q_proj", "self_attn.o_proj", "mlp.", *blocks)
    harmless = ("lm_head", *(last + name for name in within))
    after = (model.norms.mlp, model.norms.after_attention, model.norms.after_mlp)
    norms = ("model.norm", *(last + name for name in after if name is not None))
    return all(module.startswith(harmless) or module in norms for module in changed_modules(tensors))


class _Head(NamedTuple):
    """The beginning of a canonical file, parsed and as bytes."""

    config: AdapterConfig
    header: Header
    text: bytes


def _head(adapter: AdapterTensors, peft: PeftConfig) -> _Head:
    config = AdapterConfig(
        alora_invocation_tokens=peft.alora_invocation_tokens,
        scales=adapter.scales,
        token_indices=adapter.token_indices,
    )
    metadata = {CONFIG_KEY: msgspec.json.encode(config, order="sorted").decode()}
    shapes = {name: (entry.dtype, entry.shape) for name, entry in adapter.tensors.items()}
    text = write_header(shapes, metadata)
    if len(text) > MAX_HEADER_BYTES:
        what = f"has {len(shapes)} tensors, whose header takes {len(text)} bytes, expected at most {MAX_HEADER_BYTES}"
        raise InvalidAdapter(FILE, what, "train it on fewer layers or experts")
    return _Head(config, Header(consecutive(shapes), metadata, len(text)), text)


def _write_canonical(adapter: AdapterTensors, head: bytes, out: BinaryIO, pause: Callable[[], None]) -> tuple[str, int]:
    """Write a canonical file piece by piece; return its digest and its size in bytes."""
    digest, size, due = blake3(), 0, 0
    for chunk in _chunks(head, adapter):
        if size >= due:
            pause()
            due = size + CHUNK_BYTES
        digest.update(chunk)
        size += out.write(chunk)
    return digest.hexdigest(), size


def _chunks(head: bytes, adapter: AdapterTensors) -> Iterator[bytes | memoryview]:
    yield head
    for name in adapter.tensors:
        yield from adapter.finite_chunks(name)
