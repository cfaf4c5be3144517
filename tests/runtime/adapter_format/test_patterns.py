"""Any regular expression of a configuration selects what PEFT selects with it, or is refused in bounded time."""

import random
import re
import time
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key

from runtime.adapter_format import patterns, peft_config, target_modules
from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.patterns import Question, answers
from runtime.adapter_format.target_modules import TargetModules
from tests.runtime.adapter_format.adapter_files import CONFIG, SHAPES, canonical_bytes, lora

NAMES = tuple(SHAPES)
SEEN = [  # written after the kinds that training programs write
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))",
    r"^(model)(?!.*(lm_head|output|emb|wte|shared)).*",
    r"model\.layers\.[\d]+\.(mlp|self_attn)\.(up|down|gate|q|k|v|o)_proj",
    r"^(?!.*vision).*\.(?:q_proj|v_proj)$",
    r"(?i).*\.Q_PROJ",
    r"(?x) .* \. (q|v) _proj  # attention",
    r"model\.layers\.(?:0|[1-9]\d?)\.self_attn\.(?P<which>[qkv])_proj",
    r".*layers\.(?=1\b).*_proj",
    r".*(?<=self_attn)\.\w{1,2}_proj",
    r"(.*\.)*(up|down)_proj",
]
ATOMS = [
    *"qkvo.01",
    "model",
    "layers",
    "self_attn",
    "mlp",
    "_proj",
    r"\.",
    r"\d",
    r"\w",
    "[a-z]",
    "[^.]",
    "[qkv]",
    ".",
    ".*",
]
REPEATS = ["", "", "", "", "*", "+", "?", "*?", "+?", "??", "{1,2}", "{2}", "{,3}", "{1,}?", "*+", "++"]
GROUPS = [
    "({})",
    "(?:{})",
    "(?={})",
    "(?!{})",
    "(?<!{}x)",
    "(?P<g>{})",
    "(?i:{})",
    "(?>{})",
    r"\b{}",
    "^{}",
    "{}$",
    "{}|{}",
]


def random_pattern(rng: random.Random, depth: int = 3) -> str:
    parts = []
    for _ in range(rng.randint(1, 4)):
        if depth and rng.random() < 0.4:
            group = rng.choice(GROUPS)
            parts.append(group.format(*(random_pattern(rng, depth - 1) for _ in range(group.count("{}")))))
            if group.startswith("(") and group[1:3] not in ("?=", "?!", "?<"):
                parts.append(rng.choice(["", "", "", "?", "{1,2}", "{0,3}?"]))
        else:
            parts.append(rng.choice(ATOMS) + rng.choice(REPEATS))
    pattern = "".join(parts)
    # Most of what is random matches nothing, so half of the patterns get a chance to
    return pattern if depth < 3 or rng.random() < 0.5 else f".*{pattern}.*"


def valid(*texts: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return all(re.compile(text) for text in texts)
        except re.error:
            return False


def drawn(count: int, forms: tuple[str, ...] = ("{}",)) -> list[str]:
    rng = random.Random(7)
    found = list(filter(lambda text: valid(*(form.replace("{}", text) for form in forms)), SEEN))
    while len(found) < count:
        text = random_pattern(rng)
        if valid(*(form.replace("{}", text) for form in forms)):
            found.append(text)
    return found


def test_thousands_of_random_patterns_select_what_peft_selects():
    texts = drawn(2500)
    ours = answers(tuple(Question("target_modules", (text,), whole=True) for text in texts), NAMES, 60.0)
    some = 0
    for text, matches in zip(texts, ours, strict=True):
        config = SimpleNamespace(target_modules=text, exclude_modules=None)
        expected = [bool(check_target_module_exists(config, name)) for name in NAMES]
        assert [match is not None for match in matches] == expected, text
        some += any(expected)
    assert some > 500


def test_random_keys_give_the_ranks_that_peft_gives():
    texts, rng = drawn(1500, ("(.*\\.)?({})$",)), random.Random(8)
    keys = [tuple(rng.sample(texts, 3)) for _ in range(500)]
    ours = answers(tuple(Question("rank_pattern", each, r"(.*\.)?(", ")$") for each in keys), NAMES, 60.0)
    for each, matches in zip(keys, ours, strict=True):
        found = [name if match is None else each[match[0]] for name, match in zip(NAMES, matches, strict=True)]
        assert found == [get_pattern_key(each, name) for name in NAMES], each


CONFIGS = {
    "a pattern and exclusions": {"target_modules": SEEN[2], "exclude_modules": r".*\.1\..*(?:up|down)_proj"},
    "exclusions by name": {"target_modules": r".*_proj", "exclude_modules": ["v_proj", "layers.0.mlp.up_proj"]},
    "layers": {"target_modules": ["q_proj", "up_proj", "lm_head"], "layers_to_transform": [1]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "layers by a pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": r"l[a-z]+s"},
    "layers by the second": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "layers"],
    },
    "layers by an alternative": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "(h|layers)",
    },
    "layers by a loose one": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "h|layers"},
    "layers of another model": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks"]},
    "a whole name in another layer": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "an empty pattern of layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ""},
    "an empty one in a list": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": [""]},
}


def is_adapted(config, name):
    answer = check_target_module_exists(config, name)
    return bool(answer) and not isinstance(answer, _ExcludedModule)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_configuration_selects_what_peft_selects(config):
    peft = SimpleNamespace(**{"exclude_modules": None} | config)
    expected = {name for name in NAMES if is_adapted(peft, name)}
    assert TargetModules(config).among(NAMES) == expected


RUNAWAYS = [r"(.*)*(.*)*(.*)*x!", r"(?:ab|..|.)*!", r"((.*.*)*.*)*\1?!", "((((.{0,9}){0,9}){0,9}){0,9}){0,9}!"]


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
def test_a_pattern_that_runs_away_is_refused_in_bounded_time(field, monkeypatch):
    for module in (peft_config, target_modules):
        monkeypatch.setattr(module, "answers", partial(answers, seconds=0.3))
    value = {"(.*)*(.*)*(.*)*x!": 4} if field.endswith(("k_pattern", "a_pattern")) else RUNAWAYS[0]
    config = CONFIG | {field: value} | ({"layers_to_transform": [0]} if field == "layers_pattern" else {})
    started = time.thread_time()
    with pytest.raises(InvalidAdapter, match="list the names") as refused:
        canonical_bytes(lora(), config)
    assert field in refused.value.field
    assert time.thread_time() - started < 1.0  # the work is not this process's


@pytest.mark.parametrize("text", RUNAWAYS)
def test_every_kind_of_runaway_ends(text):
    with pytest.raises(InvalidAdapter, match=r"takes over 0\.2 s|regular expression"):
        answers((Question("target_modules", (text,), whole=True),), NAMES, 0.2)


def test_a_pattern_that_wants_all_memory_does_not_get_it():
    text = "|".join(f"(?:a{i}|[^{i}]){{1,60000}}" for i in range(200_000))
    with pytest.raises(InvalidAdapter, match="takes over"):
        answers((Question("target_modules", (text,), whole=True),), NAMES, 0.5)


def test_a_key_for_each_of_hundreds_of_modules_is_within_the_limit():
    names = tuple(f"model.layers.{layer}.{part}" for layer in range(80) for part in "abcdefg")
    keys = tuple(names[-1::-1])
    [matches] = answers((Question("rank_pattern", keys, r"(.*\.)?(", ")$"),), names)
    assert [match[0] for match in matches] == list(range(len(names)))[::-1]


def test_names_are_matched_without_a_process(monkeypatch):
    monkeypatch.setattr(patterns.subprocess, "run", None)
    config = CONFIG | {"rank_pattern": {r"^model\.layers.0.self_attn.q_proj$": 4}, "layers_to_transform": [0, 1]}
    assert canonical_bytes(lora(), config)
