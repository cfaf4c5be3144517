"""What lies in an extent, bit for bit: each weight's product with its scale in float32, rounded once."""

import sys
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from runtime.adapter_format.canonical import canonical_from_tensors
from runtime.adapter_format.weight_dtypes import HELD
from runtime.adapters.layout import PIECE_ELEMENTS, ExtentWriter
from runtime.adapters.pool import AdapterPool
from tests.runtime.adapter_format.adapter_files import DEADLINE_SECONDS, MODEL

# Wide enough for matrices of several pieces, and of a size at which what follows an odd tensor lies at an odd place.
WIDE = msgspec.structs.replace(
    MODEL, hidden_size=512, intermediate_size=1030, num_layers=1, head_dim=128, vocab_size=97
)
RANKS = {"q_proj": 70, "k_proj": 3, "v_proj": 64, "down_proj": 33, "up_proj": 5, "lm_head": 7, "embed_tokens": 3}
LINEARS = ["q_proj", "k_proj", "v_proj", "down_proj", "up_proj", "lm_head"]
DTYPES = {"float32": ["F32"], "float16": ["F16"], "bfloat16": ["BF16"], "mixed": ["F16", "F32", "BF16"]}
MEMORY_BYTES = 4 << 20


def weights(shape, dtype, random):
    """Any finite values of a dtype, tiny and subnormal ones and both zeros among them, as numpy holds them."""
    if dtype == "F16":
        bits = random.integers(0, 1 << 16, shape, dtype=np.uint16)
        return np.where(bits & 0x7C00 == 0x7C00, bits & 0x83FF, bits).astype(np.uint16).view(np.float16)
    bits = random.integers(0, 1 << 32, shape, dtype=np.uint32)
    exponents = random.choice([0, 1, 5, 60, 110, 120, 126, 127, 128, 200, 230], shape).astype(np.uint32)
    bits = (bits & 0x807FFFFF) | exponents << 23
    ties = random.random(shape)
    bits = np.where(ties < 0.3, (bits & 0xFFFF0000) | 0x8000, bits).astype(np.uint32)
    bits.flat[:2] = 0, 1 << 31
    return (bits >> 16).astype(np.uint16) if dtype == "BF16" else bits.view(np.float32)


def adapter(modules, dtypes, scale, *, bias):
    """Tensors under PEFT's names and their configuration; each tensor has the next of the dtypes."""
    random = np.random.default_rng(3)
    tensors = {}
    for site in WIDE.sites():
        for module, out in site.parts:
            end = module.rpartition(".")[2]
            if end not in modules:
                continue
            a, b = (
                ("lora_embedding_A", "lora_embedding_B")
                if end == "embed_tokens"
                else ("lora_A.weight", "lora_B.weight")
            )
            shapes = {a: (RANKS[end], site.in_features), b: (out, RANKS[end])} | (
                {"lora_B.bias": (out,)} if bias else {}
            )
            for leaf, shape in shapes.items():
                tensors[f"{module}.{leaf}"] = weights(shape, dtypes[len(tensors) % len(dtypes)], random)
    config = {
        "r": 1,
        "lora_alpha": 1,
        "rank_pattern": {end: RANKS[end] for end in modules},
        "alpha_pattern": {end: RANKS[end] * scale for end in modules},
        "target_modules": ".*",
        "lora_bias": bias,
    }
    return tensors, config


def exact(values, scale, dtype):
    """The bits of values times a scale, computed in float64, in which the product of two float32 is exact."""
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    product = (values.astype(np.float64) * np.float64(np.float32(scale))).astype(np.float32)
    if dtype == torch.float32:
        return product.view(np.uint32)
    bits = product.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    assert np.array_equal(rounded, torch.from_numpy(product).bfloat16().view(torch.uint16).numpy())
    return rounded


def bits_of(tensor):
    return tensor.contiguous().view(torch.uint32 if tensor.dtype == torch.float32 else torch.uint16).numpy()


def resident(tensors, config, dtype):
    """An adapter's weights by module, as they are in device memory: A and B as PEFT has them, and the bias."""
    digest, content = canonical_from_tensors(tensors, config, WIDE, max_rank=128)
    pool = AdapterPool(WIDE, MEMORY_BYTES, MEMORY_BYTES, dtype, "cpu")
    pool.register(digest, pool.loader.content_of(content))
    while not pool.acquire(digest):
        assert pool.wait(DEADLINE_SECONDS)
        pool.poll()
    found = {}
    resident_weights = pool.lookup(digest)[: len(WIDE.sites())]  # those of norms follow
    for site, layout, placed in zip(WIDE.sites(), pool.placement(digest)[0].sites, resident_weights, strict=True):
        for part, at in zip(placed.parts, layout.parts, strict=True) if placed is not None else ():
            assert at.module in [module for module, _ in site.parts]
            found[at.module] = placed.a[:, part.ranks].t(), part.b.t(), part.bias
    pool.close()
    return found


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25, 1 / 3, 2.0**-20, 1e-30, 777.7])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modules", [LINEARS, ["embed_tokens", "lm_head", "k_proj"]], ids=["linears", "embedding"])
def test_every_weight_is_its_product_with_the_scale_rounded_once(modules, dtype, dtypes, scale):
    tensors, config = adapter(modules, dtypes, scale, bias=modules is LINEARS)
    found = resident(tensors, config, dtype)
    assert {module.rpartition(".")[2] for module in found} == set(modules)
    for module, (a, b, bias) in found.items():
        names = ("lora_embedding_A", "lora_embedding_B") if "embed" in module else ("lora_A.weight", "lora_B.weight")
        stored = [tensors[f"{module}.{name}"] for name in names]
        rank = len(stored[0])
        assert np.array_equal(bits_of(a), exact(stored[0], 1.0, dtype)), f"A of {module}"
        applied = rank * scale / rank  # as a configuration says it
        assert np.array_equal(bits_of(b), exact(stored[1], applied, dtype)), f"B of {module}"
        if modules is LINEARS:
            assert np.array_equal(bits_of(bias), exact(tensors[f"{module}.lora_B.bias"], applied, dtype)), module


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux shows them")
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_thread_is_enlisted_to_write_a_large_matrix(dtype):
    """On a new thread, for which torch has none yet: for a larger piece it would start some."""
    elements = 8 * PIECE_ELEMENTS
    matrices = [(name, np.ones((8, PIECE_ELEMENTS), held)) for name, held in HELD.items()]
    writer = ExtentWriter(torch.from_numpy(np.zeros(elements * dtype.itemsize, np.uint8)).view(dtype))
    threads = []

    def write():
        threads.append(set(Path("/proc/self/task").iterdir()))
        for name, matrix in matrices:
            writer.write(slice(0, elements), matrix, name, 1 / 3)
        threads.append(set(Path("/proc/self/task").iterdir()))

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    before, after = threads
    assert after <= before
