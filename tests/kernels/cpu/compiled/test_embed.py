"""Embeddings, with the adapters on them, against their sum in float64."""

import pytest
import torch
from torch import Tensor

from kernels.cpu.compiled.panels import Panels
from kernels.cpu.compiled.program import Pool, Program
from tests.kernels.cpu.compiled.steps import (
    EMBEDDED,
    FLOATS,
    UNIT,
    Adapted,
    Adapter,
    Type,
    empty_rows,
    exact_weight,
    gaps_are_kept,
    in_panels,
    random,
    random_part,
    same_bits,
    step_of,
)

VOCABULARY, SITE = 70, 1
WEIGHTS = pytest.mark.parametrize("type", EMBEDDED, ids=str)
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=str)
HIDDEN = pytest.mark.parametrize("hidden", [1, 16, 75, 300])
RANKS = (1, 3, 8, 16, 40, 100)


def tokens_of(rows: int) -> list[int]:
    return torch.randint(VOCABULARY, (rows,), generator=torch.Generator().manual_seed(rows)).tolist()


def adapter(part: Adapted) -> Adapter:
    return Adapter([None], [part], embedding=True)


def run(
    pool: Pool, weight: Panels, tokens: list[int], owners: list[Adapter | None] | None = None, scale: float = 1.0
) -> Tensor:
    out = empty_rows(len(tokens), weight.k)
    program = Program(pool)
    program.embed(weight, out, SITE, scale)
    program.run(step_of(len(tokens), owners or [], token_ids=tokens))
    assert gaps_are_kept(out)
    return out


@WEIGHTS
@HIDDEN
def test_a_token_has_its_row_of_the_embedding_to_the_bit(pool: Pool, hidden: int, type: Type) -> None:
    weight = in_panels(random(VOCABULARY, hidden), type)
    tokens = [*range(VOCABULARY), 3, 3, 0]
    assert same_bits(run(pool, weight, tokens), exact_weight(weight)[tokens])
    assert same_bits(run(pool, weight, tokens, scale=12.5), exact_weight(weight)[tokens] * 12.5)


@DTYPES
@HIDDEN
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_an_adapted_token_has_its_adapters_row_added(pool: Pool, rows: int, hidden: int, dtype: Type) -> None:
    weight, tokens = in_panels(random(VOCABULARY, hidden), torch.bfloat16), tokens_of(rows)
    parts = [random_part(VOCABULARY, hidden, ranks, ranks, dtype, bias=ranks % 2 == 0) for ranks in RANKS]
    adapters = [adapter(part) for part in parts]
    choice = [row // 2 % (len(parts) + 1) for row in range(rows)]
    owners = [None if one == len(parts) else adapters[one] for one in choice]
    want = exact_weight(weight)[tokens].double()
    magnitude = want.abs()
    for row, one in enumerate(choice):
        if one < len(parts):
            a, b, factor, bias = parts[one]
            a, b, offset = a[:, tokens[row]].double(), b.double(), 0.0 if bias is None else bias.double()
            want[row] += factor * (b @ a) + offset
            magnitude[row] += factor * (b.abs() @ a.abs()) + abs(offset)
    base = [row for row, owner in enumerate(owners) if owner is None]
    for scale in (1.0, 0.3):
        got = run(pool, weight, tokens, owners, scale)
        assert ((got.double() - scale * want).abs() <= 12 * UNIT * scale * magnitude).all()
        assert same_bits(got[base], run(pool, weight, tokens, scale=scale)[base])


def test_an_adapter_that_does_not_adapt_the_embedding_changes_no_bit(pool: Pool) -> None:
    weight, tokens = in_panels(random(VOCABULARY, 40), torch.int8), tokens_of(9)
    other = Adapter([random_part(VOCABULARY, 40, 8, 1, torch.float32)], [None], embedding=True)
    assert same_bits(run(pool, weight, tokens, [other] * 9), run(pool, weight, tokens))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_nan_and_infinity_of_a_token_or_of_an_adapter_reach_no_other_row(pool: Pool, wrong: float) -> None:
    exact, tokens = random(VOCABULARY, 40), [5, 6, 5, 7, 6]
    good, bad = (random_part(VOCABULARY, 40, 8, seed, torch.float32) for seed in (1, 2))
    clean = run(pool, in_panels(exact, torch.float32), tokens, [adapter(good)] * 5)
    exact[7], bad.a[3, 6] = wrong, wrong
    got = run(pool, in_panels(exact, torch.float32), tokens, [adapter(one) for one in (good, bad, bad, good, good)])
    assert not got[[1, 3]].isfinite().any()
    assert same_bits(got[[0, 4]], clean[[0, 4]])
    assert got[2].isfinite().all()


def test_an_adapter_of_any_rank_is_computed(pool: Pool) -> None:
    """--max-lora-rank has no upper limit."""
    weight, part = (
        in_panels(random(VOCABULARY, 20), torch.float32),
        random_part(VOCABULARY, 20, 20_000, 3, torch.float32),
    )
    got = run(pool, weight, [4], [adapter(part)])
    a, b = part.a[:, 4].double(), part.b.double()
    want, magnitude = exact_weight(weight)[[4]].double() + part[2] * (b @ a), b.abs() @ a.abs()
    assert ((got.double() - want).abs() <= 200 * UNIT * magnitude).all()
