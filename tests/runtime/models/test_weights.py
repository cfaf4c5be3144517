"""Checkpoints in every layout give the same weights, and a broken one is refused with the tensor's name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from runtime.models.config import ModelConfig
from runtime.models.decoder import Decoder
from runtime.models.stored_tensors import InvalidCheckpoint
from runtime.models.weights import Weights, load_weights
from tests.runtime.models.families import write_checkpoint
from tests.runtime.models.paged_driver import PagedDriver

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENS = [5, 80, 33, 2, 9]


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(ModelConfig.from_directory(directory), directory, dtype, "safetensors")


def logits(config: ModelConfig, weights: Weights, dtype: torch.dtype = torch.float32) -> Tensor:
    return PagedDriver(config, Decoder(config, weights), dtype).step([(0, TOKENS, 0)])[0]


def rewrite(directory: Path, **changes: Tensor | None) -> None:
    """Replace tensors of a single-file checkpoint, dots spelled as double underscores; None drops one."""
    tensors: dict[str, Tensor | None] = dict(load_file(directory / SINGLE))
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / SINGLE)


@pytest.mark.parametrize("name", ["llama-biased", "qwen2-tied", "qwen3"])
def test_a_sharded_checkpoint_is_the_same_model(tmp_path: Path, name: str) -> None:
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    write_checkpoint(name, whole)
    write_checkpoint(name, sharded, shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    config = ModelConfig.from_directory(whole)
    assert torch.equal(logits(config, load(whole)), logits(config, load(sharded)))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_another_dtype_is_cast(tmp_path: Path, stored: torch.dtype) -> None:
    write_checkpoint("llama", tmp_path).to(stored).save_pretrained(tmp_path)
    config = ModelConfig.from_directory(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits(config, load(tmp_path)), expected, rtol=0, atol=1e-4)
    assert load(tmp_path, torch.bfloat16).embedding.dtype == torch.bfloat16


def test_a_head_repeated_in_a_tied_checkpoint_is_accepted_and_one_of_its_own_is_not(tmp_path: Path) -> None:
    write_checkpoint("llama-tied", tmp_path)
    embedding = load_file(tmp_path / SINGLE)["model.embed_tokens.weight"]
    rewrite(tmp_path, lm_head__weight=embedding.clone())
    load(tmp_path)
    rewrite(tmp_path, lm_head__weight=embedding * 2)
    with pytest.raises(InvalidCheckpoint, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(tmp_path)


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path)
    rewrite(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    load(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.2.self_attn.k_proj.weight",
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.1.mlp.up_proj.bias",
        "model.layers.1.post_attention_layernorm.weight",
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    write_checkpoint("llama-biased", tmp_path)
    rewrite(tmp_path, **{name.replace(".", "__"): None})
    with pytest.raises(InvalidCheckpoint, match=f"^the checkpoint lacks {name}$"):
        load(tmp_path)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path)
    save_file({"lm_head.weight": torch.zeros(131, 60)}, tmp_path / SINGLE)
    with pytest.raises(InvalidCheckpoint, match=r"lacks model\.embed_tokens\.weight, .* and 21 more$"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.3.mlp.up_proj.weight", "x"])
def test_a_left_over_tensor_is_named(tmp_path: Path, name: str) -> None:
    write_checkpoint("llama", tmp_path)
    rewrite(tmp_path, **{name.replace(".", "__"): torch.zeros(3)})
    with pytest.raises(InvalidCheckpoint, match=f"holds tensors that nothing uses: {name}$"):
        load(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    write_checkpoint("qwen3", tmp_path)
    rewrite(tmp_path, model__layers__1__self_attn__k_norm__weight=torch.ones(60))
    with pytest.raises(InvalidCheckpoint, match=r"k_norm\.weight has shape \(60,\) where .* makes it \(24,\)"):
        load(tmp_path)


def test_a_tensor_of_integers_is_named(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path)
    rewrite(tmp_path, model__norm__weight=torch.ones(60, dtype=torch.int8))
    with pytest.raises(InvalidCheckpoint, match=r"model\.norm\.weight is I8; supported are F32, F16, BF16"):
        load(tmp_path)


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path, shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    name = next(iter(load_file(shards[0])))
    save_file(load_file(shards[1]) | {name: torch.zeros(1)}, shards[1])
    with pytest.raises(InvalidCheckpoint, match=f"tensor {name} is in {shards[1].name} and in another file"):
        load(tmp_path)


def test_a_shard_that_does_not_exist_is_named(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path, shard_size="40KB")
    shard = min(tmp_path.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(InvalidCheckpoint, match=f"names the file {shard.name}, which does not exist"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    write_checkpoint("llama", tmp_path)
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(InvalidCheckpoint, match="must be JSON with an object weight_map of tensor to file"):
        load(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path)
    (tmp_path / SINGLE).unlink()
    with pytest.raises(InvalidCheckpoint, match=f"holds neither {SINGLE} nor {INDEX}"):
        load(tmp_path)
    (tmp_path / "model-q4_0.gguf").touch()
    with pytest.raises(InvalidCheckpoint, match=f"neither {SINGLE} nor {INDEX}: GGUF is not read; save it with trans"):
        load(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path)
    content = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content[:-10])
    with pytest.raises(InvalidCheckpoint, match=f"{SINGLE} is not a readable safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama-biased"])
def test_made_up_weights_need_no_file_and_are_the_same_each_time(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    write_checkpoint(name, tmp_path)
    (tmp_path / SINGLE).unlink()
    config = ModelConfig.from_directory(tmp_path)
    one, other = (logits(config, load_weights(config, tmp_path, dtype, "dummy"), dtype) for _ in range(2))
    assert torch.equal(one, other)
    assert one.isfinite().all()
    assert one.std() > 0.1


def test_an_index_is_followed_though_a_single_file_lies_beside_it(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path, shard_size="40KB")
    save_file({"x": torch.zeros(1)}, tmp_path / SINGLE)
    assert set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values()).isdisjoint({SINGLE})
    load(tmp_path)
