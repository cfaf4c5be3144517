"""The random adapters of benchmarks are taken by a server of a model with fused projections or with experts."""

import json
from pathlib import Path

import pytest

from loadtests.random_adapter import adapter_config, adapter_file
from runtime.adapter_format.canonical import canonicalise
from runtime.models.config import ModelConfig
from tests.runtime.models.families import write_checkpoint


@pytest.mark.parametrize("invocation", [None, [5, 6]])
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3-moe-sparse-step", "granite-moe"])
def test_a_random_adapter_adapts_all_projections(tmp_path: Path, family: str, invocation: list[int] | None) -> None:
    experts_everywhere = {"decoder_sparse_step": 1} if "sparse" in family else {}
    write_checkpoint(family, tmp_path, **experts_everywhere)
    model = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "weights").write_bytes(adapter_file(model, 1, 2, invocation))
    config = json.dumps(adapter_config(2, invocation, model)).encode()
    made = ModelConfig.from_directory(tmp_path)
    summary = canonicalise(tmp_path / "weights", config, made, tmp_path / "out", max_rank=2)
    ends = {part.module.rpartition(".")[2] for site in made.sites() for part in site.parts}
    without = {"embed_tokens", "lm_head", "gate", "layer"}  # the last two are routers
    if made.experts is not None and invocation is not None:
        without |= {"gate_proj", "up_proj", "down_proj"}
        assert all("no tensors for" in warning for warning in summary.warnings)
    assert set(summary.targets) == ends - without
