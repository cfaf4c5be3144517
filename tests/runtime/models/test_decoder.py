"""The decoder against transformers: the same tokens give the same logits, however they are cut into steps."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from runtime.models.config import SITES_PER_LAYER, ModelConfig
from runtime.models.decoder import Decoder
from runtime.models.layers import RmsNorm
from runtime.models.weights import load_weights
from tests.runtime.models.families import FAMILIES, write_checkpoint
from tests.runtime.models.paged_driver import PagedDriver

TOLERANCE = 1e-4


def prompt(length: int, seed: int = 3) -> list[int]:
    return torch.randint(0, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(model: torch.nn.Module, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()


def load(directory: Path, dtype: torch.dtype = torch.float32, sequences: int = 1) -> PagedDriver:
    config = ModelConfig.from_directory(directory)
    decoder = Decoder(config, load_weights(config, directory, dtype, "safetensors"))
    return PagedDriver(config, decoder, dtype, sequences)


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_prompt_gives_the_logits_of_transformers(tmp_path: Path, name: str) -> None:
    model = write_checkpoint(name, tmp_path)
    tokens = prompt(47)
    (logits,) = load(tmp_path).step([(0, tokens, 0)])
    assert_close(logits, expected(model, tokens))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_in_chunks_and_then_single_tokens_gives_the_same_logits(tmp_path: Path, name: str) -> None:
    model = write_checkpoint(name, tmp_path)
    tokens = prompt(30)
    driver = load(tmp_path)
    bounds = [0, 7, 8, 21, *range(22, 31)]
    parts = [driver.step([(0, tokens[first:last], first)])[0] for first, last in pairwise(bounds)]
    assert_close(torch.cat(parts), expected(model, tokens))


@pytest.mark.parametrize("name", FAMILIES)
def test_sequences_of_different_lengths_share_a_batch(tmp_path: Path, name: str) -> None:
    model = write_checkpoint(name, tmp_path)
    long, short = prompt(40, seed=4), prompt(11, seed=5)
    driver = load(tmp_path, sequences=2)
    first = driver.step([(0, long[:38], 0), (1, short[:9], 0)])
    # One sequence decodes while the other is still in its prompt, then both decode.
    second = driver.step([(0, long[38:39], 38), (1, short[9:10], 9)])
    third = driver.step([(1, short[10:], 10), (0, long[39:], 39)])
    assert_close(torch.cat((first[0], second[0], third[1])), expected(model, long))
    assert_close(torch.cat((first[1], second[1], third[0])), expected(model, short))


def test_contexts_that_may_be_longer_than_longropes_original_length_turn_by_its_long_factors(tmp_path: Path) -> None:
    model = write_checkpoint("phi3-partial-longrope", tmp_path)
    tokens = prompt(90)
    config = ModelConfig.from_directory(tmp_path)
    assert (config.default_length, config.max_position) == (64, 256)
    assert config.up_to(64) == config
    config = config.up_to(65)
    decoder = Decoder(config, load_weights(config, tmp_path, torch.float32, "safetensors"))
    (logits,) = PagedDriver(config, decoder, torch.float32, limit=128).step([(0, tokens, 0)])
    assert_close(logits, expected(model, tokens))


def test_a_decoding_sequence_and_a_prompt_share_a_batch(tmp_path: Path) -> None:
    model = write_checkpoint("qwen3", tmp_path)
    decoding, arriving = prompt(12, seed=6), prompt(20, seed=7)
    driver = load(tmp_path, sequences=2)
    driver.step([(0, decoding[:11], 0)])
    one, other = driver.step([(0, decoding[11:], 11), (1, arriving, 0)])
    assert_close(one, expected(model, decoding)[11:])
    assert_close(other, expected(model, arriving))


def test_only_the_rows_asked_for_get_logits(tmp_path: Path) -> None:
    model = write_checkpoint("llama", tmp_path)
    driver = load(tmp_path)
    tokens = prompt(9)
    groups = driver.groups([(0, tokens, 0)])
    with torch.inference_mode():
        logits = driver.decoder.forward(
            torch.tensor(tokens),
            torch.arange(9),
            driver.slots[0, :9],
            driver.kv,
            {0: groups},
            torch.tensor([8, 2]),
            None,
        )
    assert_close(logits, expected(model, tokens)[[8, 2]])


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(tmp_path: Path, name: str) -> None:
    model = write_checkpoint(name, tmp_path)
    tokens = prompt(47)
    exact = expected(model, tokens)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    theirs = (expected(rounded, tokens) - exact).abs()
    (logits,) = load(tmp_path, torch.bfloat16).step([(0, tokens, 0)])
    ours = (logits - exact).abs()
    if "moe" in name:  # a rounding makes a few rows choose another expert, which is as good
        assert ours.mean(1).median() <= 2 * theirs.mean(1).median()
        return
    assert ours.mean() <= 2 * theirs.mean()
    assert ours.max() <= 2 * theirs.max()


class RecordingLora:
    """Writes down every call, and adds to one site a number that the logits must show."""

    def __init__(self, changed: int | None = None):
        self.calls: list[tuple[object, tuple[int, ...], tuple[int, ...]]] = []
        self.norms: list[tuple[int, list[int]]] = []  # site and shape of the input
        self.changed = changed

    def norm(self, site: int, norm: RmsNorm, x: Tensor, y: Tensor) -> None:
        self.norms.append((site, list(x.shape)))
        torch.testing.assert_close(y, norm(x))

    def apply(self, site: int, x: Tensor, y: Tensor) -> None:
        self.calls.append((site, tuple(x.shape), tuple(y.shape)))
        if site == self.changed:
            y += 0.5

    def embed(self, token_ids: Tensor, x: Tensor) -> None:
        self.calls.append(("embed", tuple(token_ids.shape), tuple(x.shape)))
        if self.changed == -1:
            x += 0.5

    def apply_logits(self, x: Tensor, y: Tensor) -> None:
        self.calls.append(("logits", tuple(x.shape), tuple(y.shape)))
        if self.changed == -2:
            y += 0.5


def test_adapters_see_every_projection_in_order_with_its_input_and_output(tmp_path: Path) -> None:
    write_checkpoint("granite", tmp_path)
    lora = RecordingLora()
    driver = load(tmp_path)
    driver.step([(0, prompt(5), 0)], lora)
    sites = ModelConfig.from_directory(tmp_path).sites()
    layers = [
        (index, (5, site.in_features), (5, sum(part.out_features for part in site.parts)))
        for index, site in enumerate(sites[:-2])
    ]
    assert lora.calls == [("embed", (5,), (5, 64)), *layers, ("logits", (5, 64), (5, 131))]
    assert len(layers) == 3 * SITES_PER_LAYER
    # Two norms a layer, then the last, of the rows of logits; their sites follow those of `sites`
    assert lora.norms == [(len(sites) + index, [5, 64]) for index in range(7)]


@pytest.mark.parametrize("site", [-1, -2, *range(3 * SITES_PER_LAYER)])
def test_what_an_adapter_adds_at_a_site_reaches_the_logits_and_adding_nothing_changes_nothing(
    tmp_path: Path, site: int
) -> None:
    model = write_checkpoint("qwen3", tmp_path)
    tokens = prompt(6)
    (untouched,) = load(tmp_path).step([(0, tokens, 0)], RecordingLora())
    (changed,) = load(tmp_path).step([(0, tokens, 0)], RecordingLora(site))
    assert_close(untouched, expected(model, tokens))
    assert (changed - untouched).abs().max() > 0.01


def test_an_addition_to_a_projection_equals_a_bias_in_the_model(tmp_path: Path) -> None:
    model = write_checkpoint("granite-biased", tmp_path)
    tokens = prompt(6)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.bias += 0.5
    (changed,) = load(tmp_path).step([(0, tokens, 0)], RecordingLora(changed=SITES_PER_LAYER + 3))
    assert_close(changed, expected(model, tokens))
