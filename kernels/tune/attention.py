"""The tuner's cases of the kernels around the KV cache: the write to it, decode and prefill."""

from typing import Any

import torch
from torch import Tensor

from kernels import kv_write, paged_attention
from kernels.reference import kv_write as reference_write
from kernels.reference import paged_attention as reference_attention
from kernels.tune.choosing import Case
from kernels.tune.rows import ROUNDINGS, ModelShape

BLOCK_SIZE = 16


def write_case(model: ModelShape, rows: int) -> Case:
    """`rows` tokens with a norm per head, each written to a slot of its own."""
    rounding = ROUNDINGS[model.dtype]
    heads = model.q_heads + 2 * model.kv_heads
    half = model.head_dim // 2

    def prepare(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator(model.device).manual_seed(seed)
        slots = torch.randperm(2 * rows, generator=generator, device=model.device)[:rows]
        frequencies = 10000.0 ** -(torch.arange(half, device=model.device) / half)
        weights = model.random(seed + 1000, 2, model.head_dim)
        kv = model.random(seed + 2000, 2 * rows, 2, model.kv_heads, model.head_dim)
        qkv = model.random(seed, rows, heads, model.head_dim)
        return qkv, torch.arange(rows, device=model.device), slots, frequencies, *weights, 1e-6, kv

    return Case(
        kernel="qkv_write",
        rows=rows,
        shape=f"{heads} heads, d={model.head_dim}",
        candidates=kv_write.CANDIDATES,
        prepare=prepare,
        launch=kv_write.qkv_write,
        twin=reference_write.qkv_write,
        written=(0, 7),
        rtol=rounding,
        atol=rounding / 16,
    )


def decode_case(model: ModelShape, rows: int, context: int) -> Case:
    """`rows` sequences of `context` tokens, in scattered blocks.

    The kernel rounds the weights too, so an output may be off by that share of the values it mixes.
    """

    def prepare(seed: int) -> tuple[Any, ...]:
        q, kv, tables, contexts, out = _pool(model, rows, [context] * rows, seed)
        return q, kv, tables, contexts, BLOCK_SIZE, model.head_dim**-0.5, out

    return Case(
        kernel="paged_decode",
        rows=rows,
        shape=f"{_heads(model)}, context {context}",
        candidates=paged_attention.DECODE_CANDIDATES,
        prepare=prepare,
        launch=paged_attention.paged_decode,
        twin=reference_attention.paged_decode,
        written=(6,),
        cold=True,
        rtol=ROUNDINGS[model.dtype],
        atol=ROUNDINGS[model.dtype],
    )


def prefill_case(model: ModelShape, rows: int, context: int) -> Case:
    """One sequence of `context` tokens; its last `rows` tokens are the queries."""

    def prepare(seed: int) -> tuple[Any, ...]:
        q, kv, tables, contexts, out = _pool(model, rows, [context], seed)
        starts = torch.tensor([0, rows], dtype=torch.int32, device=model.device)
        return q, kv, tables, contexts, starts, BLOCK_SIZE, model.head_dim**-0.5, out

    return Case(
        kernel="paged_prefill",
        rows=rows,
        shape=f"{_heads(model)}, context {context}",
        candidates=paged_attention.PREFILL_CANDIDATES,
        prepare=prepare,
        launch=paged_attention.paged_prefill,
        twin=reference_attention.paged_prefill,
        written=(7,),
        cold=True,
        rtol=ROUNDINGS[model.dtype],
        atol=ROUNDINGS[model.dtype],
    )


def _heads(model: ModelShape) -> str:
    return f"{model.q_heads}/{model.kv_heads} heads, d={model.head_dim}"


def _pool(model: ModelShape, rows: int, contexts: list[int], seed: int) -> tuple[Tensor, ...]:
    """Queries, cache, tables, context lengths and an output full of NaN."""
    generator = torch.Generator(model.device).manual_seed(seed)
    blocks = -(-max(contexts) // BLOCK_SIZE)
    total = len(contexts) * blocks
    order = torch.randperm(total, generator=generator, device=model.device)
    tables = (order + 1).view(len(contexts), blocks).to(torch.int32)
    kv = model.random(seed, (total + 1) * BLOCK_SIZE, 2, model.kv_heads, model.head_dim)
    q = model.random(seed + 1000, rows, model.q_heads, model.head_dim)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=model.device)
    return q, kv, tables, lengths, torch.full_like(q, torch.nan)
