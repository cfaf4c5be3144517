"""Each kind of adapter that is found in the wild goes through an upload's check, and then says what it says in PEFT."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

from runtime.adapter_format.base_tensors import base_tensors
from runtime.adapter_format.canonical import AdapterSummary, canonicalise
from runtime.adapter_format.errors import InvalidAdapter
from runtime.config import MIB, EngineConfig
from runtime.engine import Engine
from runtime.messages import SamplingParams
from tests.adapters_in_the_wild.kinds import KINDS, Kind
from tests.oracle import logits_of_output
from tests.runtime.models.families import FAMILIES, write_checkpoint

PROMPT = [3, 17, 5, 9, 7, 11, 40, 2, 77]  # has the invocations of the aLoRAs
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
TRIED = [kind for kind in KINDS if kind.family in FAMILIES]
OTHERS = [kind for kind in KINDS if kind.family not in FAMILIES]
LEAST_SHARE = 0.9  # of the kinds whose family is served
KNOWN = set(peft.LoraConfig.__dataclass_fields__)

# PEFT warns of fields of other versions, and of keys that match no module
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "RuntimeWarning")]


class Base:
    """A family's tiny model under transformers, and an engine on the same weights."""

    def __init__(self, family: str, directory: Path) -> None:
        self.model = write_checkpoint(family, directory)
        self.config = EngineConfig(
            model=str(directory),
            kv_cache_bytes=MIB,
            adapter_bytes=4 * MIB,
            host_adapter_bytes=4 * MIB,
            max_model_len=64,
            threads=1,
        )
        self.engine = Engine(self.config)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Base]]:
    families = sorted({kind.family for kind in TRIED})
    started = {family: Base(family, tmp_path_factory.mktemp(family)) for family in families}
    yield started
    for base in started.values():
        base.engine.check()
        base.engine.close()


def write(kind: Kind, base: Base, directory: Path) -> None:
    """The two files as the kind's program leaves them: random weights, under the configuration as it is written."""
    fields = {name: value for name, value in kind.config.items() if name in KNOWN and name != "inference_mode"}
    torch.manual_seed(len(kind.name))
    model = peft.get_peft_model(copy.deepcopy(base.model), peft.LoraConfig(**fields))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "trainable_tokens" in name or "modules_to_save" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=kind.copies)
    dtype, (old, new) = getattr(torch, kind.dtype), kind.renamed
    tensors = {name.replace(old, new) if old else name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    written: dict[str, Any] = {"base_model_name_or_path": "org/tiny"} | kind.config
    (directory / "adapter_config.json").write_text(json.dumps(written, default=list))


def checked(base: Base, directory: Path) -> AdapterSummary:
    """Do what an upload does with the two files."""
    return canonicalise(
        directory / "adapter_model.safetensors",
        (directory / "adapter_config.json").read_bytes(),
        base.engine.runner.model,
        directory / "canonical",
        max_rank=base.config.max_lora_rank,
        base_model_names=["org/tiny"],
        strict=True,
        base_tensor=base_tensors(base.config),
    )


def agrees(kind: Kind, base: Base, digest: str, directory: Path) -> None:
    """Compare what the engine says under the adapter with PEFT, which loads the same two files."""
    tokens = kind.config.get("alora_invocation_tokens")
    start = None
    if tokens:
        start = next(i for i in range(len(PROMPT)) if PROMPT[i : i + len(tokens)] == tokens)
    [completion] = base.engine.generate([PROMPT], GREEDY, digest, None if start is None else [start])
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), directory).eval()
    logits = logits_of_output(model, PROMPT, completion.token_ids, start)
    assert completion.token_ids == logits.argmax(-1).tolist(), kind.name
    with model.disable_adapter():
        plain = logits_of_output(model, PROMPT, completion.token_ids)
    assert (logits - plain).abs().max() > 0.01, f"{kind.name}: the adapter changes nothing, so nothing was compared"


def test_each_kind_says_what_it_says_in_peft_or_is_refused_by_name(
    bases: dict[str, Base], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused: dict[str, str] = {}
    for number, kind in enumerate(TRIED):
        directory, base = tmp_path / f"{number}", bases[kind.family]
        directory.mkdir()
        write(kind, base, directory)
        try:
            summary = checked(base, directory)
        except InvalidAdapter as refusal:
            refused[kind.name] = str(refusal)
            continue
        assert not [warning for warning in summary.warnings if "no tensors" in warning], kind.name
        base.engine.register_adapter(summary.digest, directory / "canonical")
        agrees(kind, base, summary.digest, directory)
        base.engine.retire_adapter(summary.digest)
    share = 1 - len(refused) / len(TRIED)
    with capsys.disabled():
        print(f"\nadapters in the wild: {share:.0%} of {len(TRIED)} kinds of {len(bases)} families are served exactly;")
        print(f"  refused: {', '.join(refused) or 'none'}; families to come: {', '.join(k.family for k in OTHERS)}")
    assert {kind.name: refused[kind.name] for kind in TRIED if kind.plain and kind.name in refused} == {}
    assert share >= LEAST_SHARE


def test_there_are_sixty_three_kinds_of_different_names() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) == 63
