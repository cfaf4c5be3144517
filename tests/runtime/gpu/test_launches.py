"""How many kernels a step of Qwen3-8B launches, and how many programs those have: counted, and nothing is computed."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from kernels.offset_table import FIELDS
from runtime.gpu.cuda_graphs import StepGraphs, graph_shapes
from runtime.gpu.fused_decoder import FusedDecoder
from runtime.gpu.packed_linear import DeviceWeights
from runtime.gpu.step_inputs import StepShape, parts_of
from runtime.gpu.step_lora import DECODE_HEIGHT, PREFILL_HEIGHT, LoraMemory, StepLora
from runtime.models.config import ModelConfig
from runtime.models.weights import open_checkpoint
from tests.runtime.gpu.launch_counts import LaunchCounts

META = torch.device("meta")
LAYERS, MOST, WIDTH, LORA_RANKS = 36, 128, 64, 768
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
}


class NoGenerator:
    """The meta device has none."""

    def __init__(self, device):
        pass

    def manual_seed(self, seed):
        pass


class Model:
    """Qwen3-8B on a device without memory."""

    def __init__(self, directory):
        (directory / "config.json").write_text(json.dumps(QWEN3_8B))
        self.config = ModelConfig.from_directory(directory)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "Generator", NoGenerator)
            checkpoint = open_checkpoint(self.config, directory, torch.bfloat16, "dummy", META, pack=False)
            weights = DeviceWeights(torch.bfloat16, META, "").load(checkpoint)
        self.decoder = FusedDecoder(self.config, weights, 16, 16 * WIDTH, "")
        slots = torch.empty(16 * 64, 2, 8, 128, dtype=torch.bfloat16, device=META)
        self.kv = [slots] * LAYERS
        table = torch.empty(2 * MOST, len(self.config.sites()), FIELDS, dtype=torch.int64, device=META)
        arena = torch.empty(16, dtype=torch.bfloat16, device=META)
        hots = torch.empty(2 * MOST, dtype=torch.int32, device=META)
        self.memory = LoraMemory.of(self.config, arena, table, hots, 2048, MOST, LORA_RANKS)

    def step(self, shape):
        """What a step of this shape launches."""
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode(), LaunchCounts(patch) as counts:
            inputs = parts_of(torch.empty(shape.total, dtype=torch.int32, device=META), shape)
            lora = StepLora(self.config, self.memory, inputs, shape, "") if shape.tiles else None
            self.decoder.forward(inputs, self.kv, lora)
        return counts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def graphs():
    shapes = graph_shapes(MOST, 2048, WIDTH, LORA_RANKS)
    return StepGraphs(lambda shape: None, lambda shape: None, shapes, lambda call: call)


def decodes(rows, tiles=0, ranks=48):
    return StepShape(rows, rows, 0, 20, rows, tiles, 0, DECODE_HEIGHT, ranks * (tiles > 0))


def mixed(rows, prompt, tiles=0, ranks=48):
    return StepShape(rows + prompt, rows, 1, 20, rows + 1, tiles, 0, PREFILL_HEIGHT, ranks * (tiles > 0))


@pytest.mark.parametrize("rows", [1, 8, 17, 128])
def test_a_decode_step_of_the_base_launches_no_more_than_its_layers_need(model, graphs, rows):
    counts = model.step(graphs.padded(decodes(rows)))
    print(counts.kernels, counts.programs, counts.operations, counts.launches)
    splits = rows < 17
    assert counts.kernels == {
        "qkv_write": LAYERS,
        "decode": LAYERS,
        "add_rms_norm": 2 * LAYERS - 1,
        "rms_norm": 2,
        "silu_mul": LAYERS,
    } | ({"reduce": LAYERS} if splits else {})
    assert counts.products == 4 * LAYERS + 1
    assert counts.launches == 329 + LAYERS * splits


@pytest.mark.parametrize(("rows", "tiles", "ranks"), [(1, 1, 48), (8, 1, 48), (8, 8, 48), (128, 8, 48), (8, 8, 700)])
def test_adapters_add_two_launches_to_each_projection_and_none_to_what_they_leave_alone(
    model, graphs, rows, tiles, ranks
):
    base, counts = (model.step(graphs.padded(each)) for each in (decodes(rows), decodes(rows, tiles, ranks)))
    print(counts.kernels, counts.programs, counts.operations, counts.launches)
    assert counts.kernels - base.kernels == {"shrink": 4 * LAYERS, "expand": 4 * LAYERS}
    assert counts.operations == base.operations
    embedded = model.step(graphs.padded(decodes(rows, tiles, ranks)._replace(embedding=True)))
    assert embedded.kernels - counts.kernels == {"embedding_shrink": 1, "expand": 1}


@pytest.mark.parametrize(("rows", "tiles"), [(1, 1), (8, 8), (128, 8)])
def test_hot_adapters_add_one_launch_to_each_projection(model, graphs, rows, tiles):
    base, counts = (
        model.step(graphs.padded(each)) for each in (decodes(rows), decodes(rows, tiles)._replace(hot=True))
    )
    assert counts.kernels - base.kernels == {"expand": 4 * LAYERS}
    assert counts.operations == base.operations


@pytest.mark.parametrize("tiles", [0, 1, 8])
def test_a_step_with_a_prompt_launches_what_a_decode_step_does_and_the_attention_of_prompts(model, graphs, tiles):
    counts, decoding = (model.step(graphs.padded(each)) for each in (mixed(8, 128, tiles), decodes(64, tiles)))
    print(counts.kernels, counts.programs, counts.operations, counts.launches)
    assert counts.kernels - decoding.kernels == {"prefill": LAYERS}
    assert counts.operations == decoding.operations


def test_a_large_batch_under_few_adapters_launches_few_idle_programs(model, graphs):
    """Of 128 decodes under one r16 adapter, 8 tiles have rows; a tile each was once launched for all of them."""
    counts = model.step(graphs.padded(decodes(128, tiles=8)._replace(hot=True)))
    assert counts.programs["shrink"] + counts.programs["expand"] == 4864 * LAYERS
    every_tile = model.step(decodes(128, tiles=128, ranks=192))
    assert every_tile.programs["shrink"] + every_tile.programs["expand"] == 102400 * LAYERS
