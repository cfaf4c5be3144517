"""Adapters that repeat one of the base's own tensors, as PEFT saves them beside an adapted embedding."""

import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from tests.service.adapters.adapter_bundles import config, multipart
from tests.service.adapters.adapter_service import Service, error, serving

EMBEDDING = np.random.default_rng(7).standard_normal((64, 16)).astype(np.float32)
COPY = "base_model.model.lm_head.base_layer.weight"


@pytest.fixture(params=["single", "sharded"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The weights of a base with tied embeddings, in one file or in two."""
    directory = tmp_path / "base"
    directory.mkdir()
    name = "model.embed_tokens.weight"
    if request.param == "single":
        save_file({"model.norm.weight": EMBEDDING[0], name: EMBEDDING}, directory / "model.safetensors")
    else:
        save_file({"model.norm.weight": EMBEDDING[0]}, directory / "first.safetensors")
        save_file({name: EMBEDDING}, directory / "second.safetensors")
        index = {"weight_map": {"model.norm.weight": "first.safetensors", name: "second.safetensors"}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def put(service: Service, copy: np.ndarray) -> httpx.Response:
    head = "base_model.model.lm_head"
    weights = {
        f"{head}.lora_A.weight": np.ones((2, 16), np.float32),
        f"{head}.lora_B.weight": np.ones((64, 2), np.float32),
        COPY: copy,
    }
    return service.client.put("/adapters/poet", files=multipart(config(target_modules=["lm_head"]), save(weights)))


def test_an_equal_copy_is_accepted_and_another_is_refused(tmp_path: Path, base: Path) -> None:
    changed = EMBEDDING.copy()
    changed[-1, -1] += 1
    with serving(tmp_path / "data", base=base) as service:
        assert error(put(service, changed)) == (422, "invalid_adapter", COPY)
        assert error(put(service, EMBEDDING[:-1])) == (422, "invalid_adapter", COPY)
        assert service.files() == []
        response = put(service, EMBEDDING)
        assert (response.status_code, response.json()["targets"]) == (201, ["lm_head"])


def test_a_base_of_made_up_weights_has_no_copies(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as service:
        assert error(put(service, EMBEDDING)) == (422, "invalid_adapter", COPY)
