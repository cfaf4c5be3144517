"""A forward pass as a program: operations recorded once, and run by one call a step.

The call releases the interpreter's lock for the whole step, so that threads which load adapters neither wait for a step
nor hold one up between two of its operations.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kernels.cpu.compiled import structs
from kernels.cpu.compiled.library import load
from kernels.cpu.compiled.panels import TYPES, Panels

Form = Literal["store", "add", "gated", "gated_gelu", "capped", "gated_clamped"]
FORMS: tuple[Form, ...] = ("store", "add", "gated", "gated_gelu", "capped", "gated_clamped")
NO_SITE = -1


class Part(NamedTuple):
    """One projection of a stacked site."""

    weight: Panels
    bias: Tensor | None  # (columns,) float32


class Pool:
    """The threads that run programs, one program at a time."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.handle: int = load().pool_new(threads)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End the threads."""
        handle, self.handle = self.handle, 0
        if handle:
            load().pool_delete(handle)


class Program:
    """Operations on buffers of rows. A buffer is a float32 tensor (most rows, width) that lasts as long as the program.

    What an operation computes is written in the C++ header of its name. `site` is the index into an adapter's sites.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._arguments: list[ctypes.Structure] = []
        self._kept: list[Any] = []  # memory that the arguments point to
        self._operations: ctypes.Array[structs.Operation] | None = None

    def embed(self, weight: Panels, out: Tensor, site: int, scale: float = 1.0) -> None:
        """out = scale · (the tokens' rows of `weight` (vocabulary, hidden) and of their adapters)."""
        self._keep(weight)
        self._add(structs.Embed(self._rows(out), weight.address, weight.k, weight.type, site, scale))

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        out: Tensor,
        *,
        of_logits: bool = False,
        add: bool = False,
        site: int = NO_SITE,
    ) -> None:
        """out = RMSNorm(x) for all rows, or for those whose logits are computed; with `add`, out += that.

        `weight` is float32; an adapter may have its own at `site`.
        """
        kinds = weight.shape[-1], of_logits, add, site
        self._add(structs.RmsNorm(self._rows(x), self._rows(out), self._keep(weight), *kinds, eps))

    def linear(
        self,
        x: Tensor,
        parts: Sequence[Part],
        out: Tensor,
        site: int,
        form: Form = "store",
        scale: float = 1.0,
        *,
        of_logits: bool = False,
        gates: Tensor | None = None,
    ) -> None:
        """Project `x` by the parts of a site, which lie side by side in `out`, and by the adapters of its rows.

        The sigmoid of `gates` (most rows, 1) is a factor of each row's outputs.
        """
        operation = self._linear(x, parts, out, site, form, scale, of_logits)
        if gates is not None:
            operation.gates = self._rows(gates)
        self._add(operation)

    def _linear(
        self, x: Tensor, parts: Sequence[Part], out: Tensor, site: int, form: Form, scale: float, of_logits: bool
    ) -> structs.Linear:
        described, first = [], 0
        for weight, bias in parts:
            self._keep(weight)
            described.append(structs.LinearPart(weight.address, self._keep(bias), weight.columns, first))
            first += 0 if form.startswith("gated") else weight.columns
        weight = parts[0].weight
        assert len({(one.type, one.k, one.group) for one, _ in parts}) == 1, "a site's parts lie in one kind of panels"
        operation = structs.Linear(
            self._rows(x), self._rows(out), (structs.LinearPart * structs.MOST_PARTS)(*described)
        )
        operation.parts, operation.k, operation.type = len(parts), weight.k, weight.type
        operation.group, operation.order = weight.group, self._keep(weight.order)
        operation.site, operation.logits, operation.form, operation.scale = site, of_logits, FORMS.index(form), scale
        return operation

    def experts(
        self,
        x: Tensor,
        scores: Tensor,
        gathered: Tensor,
        inner: Tensor,
        out: Tensor,
        experts: Sequence[tuple[Sequence[Part], Part]],
        first_site: int,
        chosen: int,
        *,
        normalised: bool,
        gate: Form = "gated",
        limit: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        """out += scale · Σ weight · expert(x), over the `chosen` experts that `scores` (rows, experts) are highest of.

        `limit` is that of a `gate` gated_clamped.

        An expert is its gate and up, and its down; it has two sites, from `first_site` on. The weights are the softmax
        of a row's scores, of all or, `normalised`, of those chosen. `gathered` (rows · chosen, hidden) and `inner`
        (rows · chosen, width) are room, which several layers may share.
        """
        linears: list[structs.Linear] = []
        for index, (gate_up, down) in enumerate(experts):
            site = first_site + 2 * index
            linears.append(self._linear(gathered, gate_up, inner, site, gate, limit, False))
            linears.append(self._linear(inner, [down], gathered, site + 1, "store", 1.0, False))
        array = (structs.Linear * len(linears))(*linears)
        self._kept.append(array)
        rows, width = len(scores), len(experts)
        room = [
            torch.zeros(rows * chosen, dtype=dtype) for dtype in (torch.int32, torch.float32, torch.int32, torch.int32)
        ]
        room.append(torch.zeros(width + 1, dtype=torch.int32))
        self._add(
            structs.Experts(
                *map(self._rows, (x, scores, gathered, inner, out)),
                ctypes.addressof(array),
                *map(self._keep, room),
                *(width, chosen, x.shape[1], normalised),
                scale,
            )
        )

    def rotate_write(
        self,
        qkv: Tensor,
        kv: Tensor,
        heads: int,
        norms: tuple[Tensor, Tensor] | None = None,
        eps: float = 0.0,
        *,
        rope: int = 0,
        turned: int | None = None,
        interleaved: bool = False,
    ) -> None:
        """Rotate queries and keys of `qkv` in place, and write keys and values to `kv` (slots, 2, kv_heads, d).

        `kv` has that many items, in the order that kv.h describes.

        `norms` are the weights of an RMSNorm of each query head and each key head, (d,), or of all of them together,
        (heads · d,) and (kv_heads · d,), before the rotation. The first `turned` dimensions of a head turn, by default
        all, by the angles of the step's rope of that index; a pair are those turned / 2 apart, or neighbours.
        """
        query, key = (None, None) if norms is None else (self._keep(norms[0]), self._keep(norms[1]))
        kv_heads, head_dim = kv.shape[2:]
        whole = norms is not None and len(norms[0]) != head_dim
        kinds = heads, kv_heads, head_dim, TYPES[kv.dtype]
        turning = whole, rope, head_dim if turned is None else turned, interleaved
        self._add(structs.RotateWrite(self._rows(qkv), self._keep(kv), query, key, *kinds, *turning, eps))

    def attention(
        self,
        q: Tensor,
        kv: Tensor,
        out: Tensor,
        heads: int,
        block_size: int,
        scale: float,
        window: int = 0,
        cap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> None:
        """Attend from the first `heads` heads of `q` over each row's context in `kv`, as `rotate_write` writes it.

        With a `window`, a row sees the last so many tokens of its context; a `cap` other than 0 caps the scores.
        `sinks` (heads,) are scores that each head's softmax has beside those of tokens.
        """
        kv_heads, head_dim = kv.shape[2:]
        kinds = heads, kv_heads, head_dim, block_size, TYPES[kv.dtype], window
        memory = self._rows(q), self._rows(out), self._keep(kv), self._keep(sinks)
        self._add(structs.Attention(*memory, *kinds, scale, cap))

    def find_best(self, logits: Tensor, best: "ctypes.Array[structs.Best]") -> None:
        """Find each row's highest logit, and the logarithm of the sum of all exponentials."""
        self._kept.append(best)
        self._add(structs.FindBest(self._rows(logits), ctypes.addressof(best), logits.shape[1]))

    def run(self, step: structs.Step) -> None:
        """Run all operations on the rows of a step."""
        operations = self._operations
        if operations is None:
            kinds = [structs.KINDS.index(type(arguments)) for arguments in self._arguments]
            each = zip(kinds, self._arguments, strict=True)
            described = [structs.Operation(kind, ctypes.addressof(one)) for kind, one in each]
            operations = (structs.Operation * len(kinds))(*described)
            self._operations = operations
        load().program_run(self.pool.handle, ctypes.addressof(operations), len(operations), ctypes.addressof(step))

    def _add(self, operation: ctypes.Structure) -> None:
        self._arguments.append(operation)
        self._operations = None

    def _rows(self, buffer: Tensor) -> structs.Rows:
        assert buffer.dtype is torch.float32
        assert buffer.stride(1) == 1
        self._kept.append(buffer)
        return structs.Rows(buffer.data_ptr(), buffer.stride(0))

    def _keep(self, memory: Any) -> int | None:
        """The address of a tensor, which the program keeps alive; None for None."""
        if memory is None:
            return None
        self._kept.append(memory)
        return memory.data_ptr() if isinstance(memory, Tensor) else None
