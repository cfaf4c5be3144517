"""Small adapters for tests: tensors, configurations and files of a two-layer model, and pools to settle."""

import json
from pathlib import Path

import numpy as np

from runtime.adapter_format.canonical import CanonicalFile, canonical_from_tensors, read_canonical
from runtime.adapter_format.safetensors_header import write_header
from runtime.messages import AdapterState, Answer, PinsSet
from runtime.models.config import ModelConfig, RopeConfig

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=112,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=128,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    tie_embeddings=False,
)
DEADLINE_SECONDS = 30.0
SHAPES = {part.module: (site.in_features, part.out_features) for site in MODEL.sites() for part in site.parts}
Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.1.self_attn.v_proj"
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [Q, V]}


def lora(*modules, rank=4, seed=0, prefix="base_model.model.", dtype=np.float32):
    """Random A and B of the modules; a rank may be a dict by module."""
    random = np.random.default_rng(seed)
    tensors = {}
    for module in modules or (Q, V):
        inputs, outputs = SHAPES[module]
        r = rank[module] if isinstance(rank, dict) else rank
        a, b = ("lora_A.weight", "lora_B.weight")
        if module.endswith("embed_tokens"):
            a, b = ("lora_embedding_A", "lora_embedding_B")
        tensors[f"{prefix}{module}.{a}"] = random.standard_normal((r, inputs)).astype(dtype)
        tensors[f"{prefix}{module}.{b}"] = random.standard_normal((outputs, r)).astype(dtype)
    return tensors


def file_bytes(tensors, metadata=None):
    """A safetensors file of float32, float16, or uint16 (the bits of bfloat16) arrays."""
    dtypes = {"float32": "F32", "float16": "F16", "uint16": "BF16"}
    header = write_header({n: (dtypes[t.dtype.name], t.shape) for n, t in tensors.items()}, metadata or {})
    return header + b"".join(t.tobytes() for t in tensors.values())


def raw_file(header, data=b""):
    """A file with a header given as JSON text or as an object, honest about the header's length only."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write(directory: Path, content: bytes, name="adapter_model.safetensors") -> Path:
    path = directory / name
    path.write_bytes(content)
    return path


def adapter(seed=0, rank=4, modules=(Q, V)):
    """The digest and the canonical file of a small adapter."""

    config = CONFIG | {"r": rank, "target_modules": ".*"}
    return canonical_bytes(lora(*modules, rank=rank, seed=seed), config)


def canonical_bytes(tensors, config, model=MODEL):
    """The digest and the bytes of the canonical file of an adapter."""
    digest, file = canonical_from_tensors(tensors, config, model, max_rank=64)
    return digest, file.data.tobytes()


ONE = adapter()
SIZE = 4 * (64 + 64) * 4 + 4 * (64 + 32) * 4  # bytes of ONE in float32: A and B of Q, A and B of V


def in_memory(content):
    """A canonical file as an engine has it that made it itself."""
    config, header, _ = read_canonical(content)
    return CanonicalFile(config, header, np.frombuffer(content, np.uint8))


class Clock:
    """Time that stands still until a test moves it."""

    now = 0.0

    def __call__(self):
        return self.now


def settle(pool):
    """Poll until no job is under way; the states that were reported on the way, each with the tier reached."""
    return [(event.digest, event.state, event.tier) for event in settled(pool) if isinstance(event, AdapterState)]


def answers(events):
    """The answers among events: each request id, and the code of a refusal; of pins, the codes by digest."""
    found = []
    for event in events:
        if isinstance(event, Answer):
            found.append((event.request_id, event.code))
        elif isinstance(event, PinsSet):
            found.append((event.request_id, {digest: refusal.code for digest, refusal in event.refused.items()}))
    return found


def settled(pool):
    """Poll until no job is under way; all events on the way."""
    events = pool.poll()
    pool.check()
    while pool.wait(DEADLINE_SECONDS):
        events += pool.poll()
        pool.check()
    return events
