"""The Grafana dashboard asks for metrics, and labels of theirs, that a server has."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.loadtests.commands import ROOT
from tests.loadtests.test_load import put_adapter

DASHBOARD = json.loads((ROOT / "loadtests" / "grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
METRIC = re.compile(r"\b(?:vllm:|rootstock_)\w+")
SELECTED = re.compile(r"((?:vllm:|rootstock_)\w+)\{(\w+)=")
GROUPED = re.compile(r"by \(([\w, ]+)\) \(rate\((\S+?)[\[{]")


@pytest.fixture(scope="module")
def labels(server: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The labels of each metric of a server that has answered with the base and with an adapter."""
    put_adapter(server, tmp_path_factory.mktemp("adapters"), "shown", 0)
    for model in ("tiny", "shown"):
        body = {"model": model, "prompt": "hello", "max_tokens": 3}
        assert httpx.post(f"{server}/v1/completions", json=body, timeout=60).status_code == 200
    assert httpx.delete(f"{server}/adapters/shown", timeout=60).status_code == 204
    families = text_string_to_metric_families(httpx.get(f"{server}/metrics").text)
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def expressions() -> Iterator[str]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_every_metric_and_label_of_an_expression_exists(labels: dict[str, set[str]], expression: str) -> None:
    names = METRIC.findall(expression)
    assert names
    assert set(names) <= labels.keys()
    for name, label in SELECTED.findall(expression):
        assert label in labels[name]
    for grouped, name in GROUPED.findall(expression):
        assert set(grouped.split(", ")) <= labels[name]
    assert expression.count("(") == expression.count(")")


def test_the_legends_are_labels_by_which_an_expression_groups_or_a_metric_has(labels: dict[str, set[str]]) -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert any(label in labels[name] for name in METRIC.findall(target["expr"])), target


def test_panels_do_not_overlap_and_have_numbers_of_their_own() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells = [cell for panel in DASHBOARD["panels"] for cell in area(panel["gridPos"])]
    assert len(set(cells)) == len(cells)


def area(place: dict[str, Any]) -> Iterator[tuple[int, int]]:
    for x in range(place["x"], place["x"] + place["w"]):
        for y in range(place["y"], place["y"] + place["h"]):
            yield x, y
