"""What training programs leave becomes the adapter that PEFT would have saved, or is refused by name."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from runtime.adapter_format.canonical import AdapterSummary, canonicalise
from runtime.adapter_format.errors import InvalidAdapter
from runtime.conversion.conversion import CONFIG, convert
from runtime.conversion.stored_weights import WHOLE
from service.convert.__main__ import main
from tests.runtime.adapter_format.adapter_files import CONFIG as FIELDS
from tests.runtime.adapter_format.adapter_files import MODEL, Q, V, lora

DOWN, HEAD, EMBED = "model.layers.1.mlp.down_proj", "lm_head", "model.embed_tokens"
TORCH = {name: torch.from_numpy(tensor) for name, tensor in lora().items()}


def directory(path: Path, config: object = FIELDS, **files: object) -> Path:
    path.mkdir()
    (path / CONFIG).write_text(json.dumps(config))
    for name, content in files.items():
        (path / name).write_bytes(content) if isinstance(content, bytes) else save_file(content, path / name)
    return path


def checked(path: Path) -> AdapterSummary:
    return canonicalise(path / WHOLE, (path / CONFIG).read_bytes(), MODEL, path / "canonical", max_rank=64)


def summary_of(path: Path, tensors: object, config: object = FIELDS) -> AdapterSummary:
    return checked(directory(path, config, **{WHOLE: tensors}))


def converted(source: Path, **options: object) -> tuple[AdapterSummary, list[str]]:
    target = source.with_name("converted")
    done = convert(source, target, **options)
    assert sorted(path.name for path in source.parent.iterdir() if path.name.startswith(".")) == []
    return checked(target), done


def test_a_pickle_is_read_without_running_it(tmp_path: Path) -> None:
    expected = summary_of(tmp_path / "peft", lora())
    source = directory(tmp_path / "source")
    torch.save(TORCH, source / "adapter_model.bin")
    summary, done = converted(source)
    assert summary == expected
    assert done[0] == "read the pickle adapter_model.bin, with weights_only"


class Program:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("/tmp/rootstock-was-here"),)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps({"x": Program()}), "weights_only"),
        ("program", "weights_only"),
        ("numbers", "other things than tensors"),
        ("empty", "zero_to_fp32"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!doctype html>", "web page"),
    ],
)
def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path: Path, content: object, reason: str) -> None:
    source = directory(tmp_path / "source")
    kinds = {"program": {"x": Program()}, "numbers": {"x": 1}, "empty": {"x": torch.zeros(0)}}
    if isinstance(content, bytes):
        (source / "adapter_model.bin").write_bytes(content)
    else:
        torch.save(kinds[str(content)], source / "adapter_model.bin")
    with pytest.raises(InvalidAdapter, match=reason):
        convert(source, tmp_path / "converted")
    assert not Path("/tmp/rootstock-was-here").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_shards_are_joined_and_none_may_be_missing(tmp_path: Path) -> None:
    expected = summary_of(tmp_path / "peft", lora())
    items = list(lora().items())
    names = [f"adapter_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    source = directory(tmp_path / "source", **dict(zip(names, (dict(items[:3]), dict(items[3:])), strict=True)))
    assert converted(source)[0] == expected
    shutil.rmtree(tmp_path / "converted")
    (source / names[1]).unlink()
    with pytest.raises(InvalidAdapter, match="their names say 2"):
        convert(source, tmp_path / "converted")


def test_mlx_adapters_are_turned(tmp_path: Path) -> None:
    modules, ranks = (Q, DOWN, HEAD, EMBED), {Q: 4, DOWN: 2, HEAD: 4, EMBED: 4}
    tensors = lora(*modules, rank=ranks)
    config = {"r": 4, "lora_alpha": 80, "target_modules": list(modules), "rank_pattern": {"down_proj": 2}}
    expected = summary_of(tmp_path / "peft", tensors, config | {"alpha_pattern": {"down_proj": 40}})
    mlx = {}
    for name, tensor in tensors.items():
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        mlx[f"{module}.lora_{'a' if '_A' in name else 'b'}"] = np.ascontiguousarray(tensor.T)
    own = {"fine_tune_type": "lora", "num_layers": 2, "model": "mlx-community/x-4bit"}
    own["lora_parameters"] = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    summary, done = converted(directory(tmp_path / "source", own, **{"adapters.safetensors": mlx}))
    assert summary == expected
    assert any("lora_alpha is scale·r = 80" in sentence for sentence in done)
    for field, value in (
        ("fine_tune_type", "dora"),
        ("lora_parameters", {"rank": 4}),
        ("lora_parameters", {"rank": 4, "alpha": 8, "scale": 20.0}),
    ):
        source = directory(tmp_path / f"{field}{value}"[:20], own | {field: value}, **{"adapters.safetensors": mlx})
        with pytest.raises(InvalidAdapter, match=field):
            convert(source, tmp_path / "other")
        shutil.rmtree(source)


def moved(name: str, prefix: str) -> str:
    return name.replace("base_model.model.model.", f"base_model.model.{prefix}").replace(
        "base_model.model.lm_head", f"base_model.model.{prefix.removesuffix('model.')}lm_head"
    )


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "language_model."])
def test_the_language_part_of_a_larger_model_gets_its_own_names(tmp_path: Path, prefix: str) -> None:
    modules, ranks = (Q, DOWN), {Q: 4, DOWN: 2}
    tensors = lora(*modules, rank=ranks)
    config = {"r": 4, "lora_alpha": 8, "target_modules": list(modules), "rank_pattern": {"down_proj": 2}}
    expected = summary_of(tmp_path / "peft", tensors, config | {"alpha_pattern": {DOWN: 6}})
    theirs = {moved(name, prefix): tensor for name, tensor in tensors.items()}
    theirs["base_model.model.visual.blocks.0.attn.qkv.lora_A.weight"] = np.ones((4, 8), np.float32)
    pattern = {rf"{prefix}layers\.1\.mlp\.down_proj": 2}
    own = config | {"target_modules": r"^(?!visual).*_proj", "rank_pattern": pattern}
    own["alpha_pattern"] = {rf"{prefix.replace('.', chr(92) + '.')}.*(up|down)_proj": 6}
    summary, done = converted(directory(tmp_path / "source", own, **{WHOLE: theirs}))
    assert summary == expected
    assert any("left out 1 tensors" in sentence for sentence in done)


def test_wrappers_and_names_of_adapters_leave_the_names(tmp_path: Path) -> None:
    expected = summary_of(tmp_path / "peft", lora())
    theirs = {
        name.replace("layers.", "layers._fsdp_wrapped_module.").replace(".weight", ".poet.weight"): tensor
        for name, tensor in lora().items()
    }
    config = FIELDS | {"target_modules": [Q, V]}
    assert converted(directory(tmp_path / "source", config, **{WHOLE: theirs}))[0] == expected


def test_an_old_alora_gets_the_tokens_of_its_invocation(tmp_path: Path) -> None:
    expected = summary_of(tmp_path / "peft", lora(), FIELDS | {"alora_invocation_tokens": [8, 9]})
    own = FIELDS | {"invocation_string": "abc", "peft_type": "ALORA"}
    source = directory(tmp_path / "source", own, **{WHOLE: lora()})
    with pytest.raises(InvalidAdapter, match="--tokenizer"):
        convert(source, tmp_path / "converted")
    with pytest.raises(InvalidAdapter, match="one token"):
        convert(source, tmp_path / "converted", lambda text: [7])
    summary, done = converted(source, tokenize=lambda text: [7, 8, 9])
    assert summary == expected
    assert any("alora_invocation_tokens = [8, 9]" in sentence for sentence in done)


def test_the_command_says_what_it_did_and_what_it_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = directory(tmp_path / "source", **{WHOLE: lora()})
    (source / "chat_template.jinja").write_text("{{ messages }}")
    main([str(source), str(tmp_path / "deep" / "target")])
    assert "wrote 4 tensors" in capsys.readouterr().out
    assert (tmp_path / "deep" / "target" / "chat_template.jinja").exists()
    for bad, reason in ((str(source), "exists already"), (str(tmp_path / "x"), "is not in")):
        with pytest.raises(SystemExit, match=f"nothing was written.*{reason}"):
            main([str(tmp_path / "nothing") if "x" in bad[-1:] else str(source), bad])
