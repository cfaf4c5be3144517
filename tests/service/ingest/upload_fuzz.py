"""Uploads with mistakes in every layer, and independent judges of what becomes of them.

usage: python -m tests.service.ingest.upload_fuzz [--seconds=600] [--seed=0]. Prints how many were accepted and refused,
by error; the first that a judge objects to is shrunk and shown, so that it can become a test of its own.
"""

import argparse
import gzip
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import safetensors
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from safetensors.torch import load

from runtime.adapter_format.canonical import canonicalise, read_canonical
from runtime.adapter_format.errors import InvalidAdapter
from service.errors import RequestError
from service.ingest.throttle import PIECE_BYTES
from service.ingest.upload_body import read_bundle
from tests.service.adapters.adapter_bundles import CONFIG, TINY, WEIGHTS, config, tensors

MAX_BYTES, MAX_RANK = 1 << 16, 8
SECONDS = 2.0  # for one upload of some KiB: more is a quadratic cost, or worse
BOUNDARY = "boundary"
ODD: list[Any] = [None, True, False, 0, -1, 1, 2, 1.5, 1e308, 2**63, 2**70, "", "a", "F32", "BF16", "\u0000", "\ud83d"]
ODD += [[], {}, [0], [0, 2**64], [[]], {"": None}, "x" * 3000, "q_proj", ".*", "(a+)+$", [16, 2], "LORA", "all-linear"]
# What a configuration may say besides, right or wrong for these weights
PLAUSIBLE: dict[str, list[Any]] = {
    "use_rslora": [True, 1],
    "lora_alpha": [1, 2.5, 16, -4, 1e30],
    "rank_pattern": [{"q_proj": 2}, {"v_proj": 9}, {"layers.1": 1}],
    "alpha_pattern": [{"q_proj": 8}, {"^model": 1}],
    "target_modules": ["all-linear", r".*\.q_proj", ["q_proj", "v_proj"], ["layers.0.self_attn.q_proj"], [], "q_proj"],
    "layers_to_transform": [[0], 0, [0, 1], [7]],
    "layers_pattern": ["layers", None],
    "exclude_modules": [["v_proj"], "q_proj"],
    "use_dora": [True],
    "bias": ["all", "lora_only"],
    "fan_in_fan_out": [True],
    "init_lora_weights": ["gaussian", "pissa", True],
    "modules_to_save": [["lm_head"], []],
    "lora_bias": [True],
    "alora_invocation_tokens": [[1, 2], []],
    "inference_mode": [True],
    "unknown_field": [1],
}


class Upload(NamedTuple):
    """A body, and the pieces in which it comes."""

    content_type: str
    body: bytes
    piece: int


class Body:
    """An upload as the parsers see it."""

    max_bytes = MAX_BYTES

    def __init__(self, upload: Upload) -> None:
        self.headers = {"content-type": upload.content_type}
        self._rest, self._piece = memoryview(upload.body), upload.piece

    def read(self, max_bytes: int = PIECE_BYTES) -> memoryview:
        size = min(max_bytes, self._piece)
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


# Mistakes


@st.composite
def edited(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one thing in it replaced, removed, renamed or added."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 3)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, changed = draw(st.sampled_from(keys)), value.copy()
        match draw(st.sampled_from(["inside", "inside", "inside", "remove", "move"])):
            case "inside":
                changed[key] = draw(edited(value[key]))
            case "remove":
                del changed[key]
            case "move" if isinstance(value, dict):
                changed[draw(st.sampled_from(["r", "lora_alpha", "", "dtype", "use_dora", "bias", "rank_pattern"]))] = (
                    value[key]
                )
            case "move":
                changed.append(value[key])
        return changed
    if isinstance(value, int) and not isinstance(value, bool) and draw(st.booleans()):
        return value + draw(st.sampled_from([-8, -4, -1, 1, 2, 4, 64]))
    return draw(st.sampled_from(ODD))


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with a piece of them changed, removed, repeated or added."""
    at = draw(st.integers(0, len(content)) | st.integers(0, min(600, len(content))))
    size = draw(st.sampled_from([1, 1, 2, 8, 100, 512, 5000]))
    match draw(st.sampled_from(["change", "change", "remove", "repeat", "add", "cut", "zeros"])):
        case "change":
            return content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at + size :]
        case "remove":
            return content[:at] + content[at + size :]
        case "repeat":
            return content[: at + size] + content[at:]
        case "add":
            return content[:at] + draw(st.binary(min_size=1, max_size=16)) + content[at:]
        case "cut":
            return content[:at]
    return content[:at] + bytes(size) + content[at + size :]


def maybe(draw: st.DrawFn, change: Callable[[Any], st.SearchStrategy[Any]], value: Any, odds: int) -> Any:
    """A value, changed once in so many times, and seldom twice."""
    while draw(st.sampled_from(range(odds))) == odds - 1:
        value = draw(change(value))
    return value


@st.composite
def weights(draw: st.DrawFn, metadata: dict[str, str]) -> bytes:
    arrays = tensors(seed=draw(st.integers(0, 3)), rank=draw(st.integers(1, 3)))
    fields: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end, data = 0, b""
    for name, array in arrays.items():
        kept = array.astype(draw(st.sampled_from([np.float32, np.float16])))
        start, end, data = end, end + kept.nbytes, data + kept.tobytes()
        fields[name] = {
            "dtype": "F32" if kept.itemsize == 4 else "F16",
            "shape": kept.shape,
            "data_offsets": [start, end],
        }
    fields = json.loads(json.dumps(fields))
    text = json.dumps(maybe(draw, edited, fields, 6)).encode()
    if draw(st.sampled_from(range(20))) == 19:
        text = text[:-1] + b"," + text[1:]  # every key twice
    text += b" " * draw(st.sampled_from([0, 0, 1, -len(text) % 8]))
    length = len(text) + draw(st.sampled_from([0] * 40 + [-1, 1, 8, 2**62]))
    return maybe(draw, damaged, (length % 2**64).to_bytes(8, "little") + text + data, 10)


@st.composite
def configurations(draw: st.DrawFn) -> bytes:
    fields = json.loads(config(rank=draw(st.integers(1, 3))))
    for name in draw(st.lists(st.sampled_from(sorted(PLAUSIBLE)), max_size=3)):
        fields[name] = draw(st.sampled_from(PLAUSIBLE[name]))
    return maybe(draw, damaged, json.dumps(maybe(draw, edited, fields, 6)).encode(), 20)


@st.composite
def forms(draw: st.DrawFn, files: list[tuple[str, bytes]]) -> bytes:
    parts = []
    for name, content in files:
        shown = draw(
            st.sampled_from([f'name="{name}"; filename="{name}"', f'name="{name}"', f'name="f"; filename="a/{name}"'])
        )
        extra = draw(
            st.sampled_from(["", "Content-Type: text/plain\r\n"] * 6 + ["Content-Transfer-Encoding: base64\r\n"])
        )
        head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; {shown}\r\n{extra}\r\n"
        parts.append(head.encode() + content + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


@st.composite
def archives(draw: st.DrawFn, files: list[tuple[str, bytes]]) -> bytes:
    stream, folder = io.BytesIO(), draw(st.sampled_from(["", "", "", "./", "run/", "run/", "a" * 120 + "/", "../"]))
    format = draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]))
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for name, content in files:
            member = tarfile.TarInfo(f"{folder}{name}"[-99 if format == tarfile.USTAR_FORMAT else 0 :])
            member.size, member.mtime = len(content), draw(st.sampled_from([0, 1.5]))
            member.type = draw(st.sampled_from([tarfile.REGTYPE] * 30 + [tarfile.AREGTYPE, tarfile.SYMTYPE, b"S"]))
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@st.composite
def uploads(draw: st.DrawFn) -> Upload:
    configuration = draw(configurations())
    kind = draw(st.sampled_from(["form", "tar", "tar.gz", "safetensors"]))
    piece = draw(st.sampled_from([1, 7, 511, 512, PIECE_BYTES]))
    if kind == "safetensors":
        held = {"adapter_config": configuration.decode("utf-8", "replace")}
        return Upload("application/vnd.safetensors", draw(weights(maybe(draw, edited, held, 20))), piece)
    files = [(CONFIG, configuration), (WEIGHTS, draw(weights({})))]
    files += draw(
        st.lists(st.sampled_from([("README.md", b"a"), ("chat_template.jinja", b"{{ 1 }}"), *files]), max_size=1)
    )
    files = draw(st.permutations(files))
    if kind == "form":
        body = maybe(draw, damaged, draw(forms(files)), 8)
        return Upload(f"multipart/form-data; boundary={BOUNDARY}", body, piece)
    body = maybe(draw, damaged, draw(archives(files)), 8)
    if kind == "tar":
        return Upload("application/x-tar", body, piece)
    return Upload("application/gzip", maybe(draw, damaged, gzip.compress(body, mtime=0), 10), piece)


# Judges


def outcome(upload: Upload, directory: Path) -> str:
    """Do with an upload what the server does, and have all judges look; returns "accepted" or the error's code."""
    descriptors, began = len(os.listdir("/proc/self/fd")), time.monotonic()
    scratch, kept = directory / "scratch", directory / "kept"
    scratch.mkdir()
    kept.mkdir()
    try:
        read = read_bundle(Body(upload), scratch)  # type: ignore[arg-type]
        judge_archive(upload, scratch)
        found = "accepted"
        canonicalise(read.weights, read.config, TINY, kept / "canonical", max_rank=MAX_RANK)
    except RequestError as error:
        found = error.code
    except InvalidAdapter as error:
        found = "invalid_adapter" if error.field else "no field is named"
    assert found != "no field is named"
    assert time.monotonic() - began < SECONDS, "it took too long"
    assert len(os.listdir("/proc/self/fd")) == descriptors, "files are open still"
    if found == "accepted":
        judge_tensors((scratch / WEIGHTS).read_bytes(), (scratch / CONFIG).read_bytes(), kept / "canonical")
    else:
        assert list(kept.iterdir()) == [], "a refused adapter left a file"
    return found


def judge_archive(upload: Upload, scratch: Path) -> None:
    """Python's tarfile finds the same files in an archive that was accepted."""
    if upload.content_type not in ("application/x-tar", "application/gzip"):
        return
    body = gzip.decompress(upload.body) if upload.content_type == "application/gzip" else upload.body
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        for name in (CONFIG, WEIGHTS):
            members = [member for member in archive if member.name.rpartition("/")[2] == name and member.isfile()]
            found = [file.read() for member in members if (file := archive.extractfile(member)) is not None]
            assert (scratch / name).read_bytes() in found, f"tarfile finds another {name}"


def judge_tensors(weights: bytes, configuration: bytes, canonical: Path) -> None:
    """The safetensors library reads the file, and PEFT applies what the canonical file says."""
    given = load(weights)  # raises for what it does not accept
    ours, header, _ = read_canonical(canonical)
    content = canonical.read_bytes()
    assert {name: tensor.shape for name, tensor in load(content).items()}.keys() == header.tensors.keys()
    theirs = peft_changes(given, json.loads(configuration))
    for module, scale in ours.scales.items():
        a, b = (load(content)[f"{module}.lora_{side}.weight"].double() for side in "AB")
        np.testing.assert_allclose((scale * b @ a).numpy(), theirs.pop(module), rtol=1e-4, atol=1e-5)
    assert all(not change.any() for change in theirs.values()), f"PEFT changes {[*theirs]} as well"


@cache
def base() -> Any:
    import torch
    import transformers

    with torch.device("meta"):
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=TINY.vocab_size,
                hidden_size=TINY.hidden_size,
                intermediate_size=TINY.intermediate_size,
                num_hidden_layers=TINY.num_layers,
                num_attention_heads=TINY.num_heads,
                num_key_value_heads=TINY.num_kv_heads,
            )
        ).to_empty(device="cpu")


def peft_changes(given: Any, configuration: dict[str, Any]) -> dict[str, np.ndarray]:
    """What PEFT adds to the weights of each module."""
    import copy

    import peft

    # A configuration without a type is a LoRA here; PEFT wants to be told
    given_or_default = {"peft_type": "LORA"} | {
        key: value for key, value in configuration.items() if key != "peft_type" or value
    }
    made = peft.PeftConfig.from_peft_type(**given_or_default | {"task_type": "CAUSAL_LM"})
    model = peft.get_peft_model(copy.deepcopy(base()), made)
    result = peft.set_peft_model_state_dict(model, dict(given))
    assert not result.unexpected_keys, f"PEFT has no place for {result.unexpected_keys}"
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def check(upload: Upload) -> str:
    with tempfile.TemporaryDirectory() as directory:
        return outcome(upload, Path(directory))


def fuzz(seconds: float, seed: int) -> Counter[str]:
    """Run for so long; returns how often each outcome came."""
    found: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:

        @hypothesis.seed(seed)
        @settings(
            max_examples=500,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(uploads())
        def batch(upload: Upload) -> None:
            if time.monotonic() < end:
                found[check(upload)] += 1

        batch()
        seed += 1
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, safetensors {safetensors.__version__}", file=sys.stderr)
    for code, count in fuzz(arguments.seconds, arguments.seed).most_common():
        print(f"{count:8} {code}")
