"""Lower bounds of the time of a step, a prompt or a copy: bytes over bandwidth, operations over throughput."""

from typing import Any, NamedTuple

from loadtests.random_adapter import tensor_shapes


class Limits(NamedTuple):
    """The highest rates of a device. The defaults are measured values of an H100 80GB, not those of its data sheet."""

    memory: float = 3.0e12  # bytes a second of device memory
    host_to_device: float = 50e9  # bytes a second
    operations: float = 800e12  # a second, in bfloat16


class Shape(NamedTuple):
    """The sizes of a dense decoder by their names in `config.json`; Qwen3-8B's by default."""

    num_hidden_layers: int = 36
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151936

    def config(self, dtype: str) -> dict[str, Any]:
        """A `config.json` of the family Qwen3 with an untied head."""
        return self._asdict() | {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": dtype,
            "eos_token_id": 2,
        }

    @property
    def projections(self) -> list[tuple[int, int]]:
        """(in, out) of every linear of every layer."""
        shapes = tensor_shapes(self._asdict(), 1)
        a = (sizes[1] for name, sizes in shapes.items() if "lora_A" in name)
        b = (sizes[0] for name, sizes in shapes.items() if "lora_B" in name)
        return list(zip(a, b, strict=True))

    @property
    def weights(self) -> int:
        """The number of weights that every step reads: all linears and the head. The embedding's rows do not count."""
        return sum(inner * outer for inner, outer in self.projections) + self.vocab_size * self.hidden_size


class Floors(NamedTuple):
    """Floors in milliseconds for one model on one device."""

    shape: Shape
    limits: Limits = Limits()
    itemsize: int = 2  # bytes of a weight, and of a number in the KV cache

    @property
    def weight_bytes(self) -> int:
        return self.shape.weights * self.itemsize

    @property
    def kv_bytes(self) -> int:
        """K/V bytes of one token in all layers."""
        shape = self.shape
        return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * self.itemsize

    def adapter_bytes(self, rank: int) -> int:
        """The bytes of an adapter of all seven linears of every layer."""
        return rank * sum(inner + outer for inner, outer in self.shape.projections) * self.itemsize

    def decode(self, batch: int, context: float, adapters: int = 0, rank: int = 0) -> float:
        """A step in which `batch` requests decode at `context` tokens: (weights + K/V + adapters) / bandwidth."""
        read = self.weight_bytes + batch * context * self.kv_bytes + adapters * self.adapter_bytes(rank)
        return 1e3 * read / self.limits.memory

    def prefill(self, tokens: int, start: int = 0, rank: int = 0) -> float:
        """`tokens` tokens of one prompt after `start` cached ones, and one row of logits: the longer of two times.

        One is 2 * (linears + rank * (in + out)) * tokens + 4 * heads * head_dim * causal pairs, over the throughput.
        The other is the bytes of weights, K/V and the adapter, over the bandwidth.
        """
        shape, stop = self.shape, start + tokens
        head = shape.vocab_size * shape.hidden_size
        linears = shape.weights - head + self.adapter_bytes(rank) // self.itemsize
        pairs = (stop * (stop + 1) - start * (start + 1)) // 2
        attention = 4 * shape.num_attention_heads * shape.head_dim * pairs * shape.num_hidden_layers
        operations = 2 * (linears * tokens + head) + attention
        read = self.weight_bytes + stop * self.kv_bytes + self.adapter_bytes(rank)
        return 1e3 * max(operations / self.limits.operations, read / self.limits.memory)

    def load(self, rank: int) -> float:
        """An adapter from host memory to the device: its bytes over the link's bandwidth."""
        return 1e3 * self.adapter_bytes(rank) / self.limits.host_to_device
