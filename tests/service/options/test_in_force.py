"""GET /config: what is in force, where it comes from, and that it tells no secret."""

from pathlib import Path

import pytest

from service.options.in_force import HIDDEN, config_in_force, without_credentials
from service.settings import all_options, read
from tests.service.live_server import LiveServer, fake_settings, live_server


def test_every_option_is_shown_with_its_value_and_its_source(tmp_path: Path) -> None:
    (tmp_path / "rootstock.toml").write_text('max-uploads = 3\nallow-source = ["hf://org"]')
    argv = ["--config", str(tmp_path / "rootstock.toml"), "--port", "0"]
    settings = read(argv, {"ROOTSTOCK_MAX_RUNNING": "8"}).settings(Path("/models/mine"), "mine")
    shown = config_in_force(settings, None)
    assert shown.engine is None
    assert shown.options.keys() == {option.name for option in all_options()}
    found = {name: (option.value, option.source) for name, option in shown.options.items()}
    assert found["port"] == (0, "command line")
    assert found["max-running"] == (8, "environment")
    assert found["max-uploads"] == (3, "file")
    assert found["allow-source"] == (["hf://org"], "file")
    assert found["drain-seconds"] == (30.0, "default")
    assert found["store"] == (None, "default")
    assert found["model"][0] == "/models/mine"


def test_it_is_answered_with_the_key_alone_and_without_the_key_in_it(tiny_model: Path, tmp_path: Path) -> None:
    endpoint = "https://user:hunter2@collector:4318/x?token=hunter3"
    settings = fake_settings(tiny_model, tmp_path, api_key="a-secret", cors_origins=("https://me:hunter4@page",))
    with live_server(settings) as live:
        assert live.client.get("/config").status_code == 401
        answer = live.client.get("/config", headers={"authorization": "Bearer a-secret"})
    assert answer.status_code == 200
    shown = answer.json()
    assert shown["options"]["api-key"] == {"value": HIDDEN, "source": "default"}
    assert shown["options"]["cors-origins"]["value"] == [f"https://{HIDDEN}@page"]
    assert "secret" not in answer.text
    assert "hunter" not in answer.text
    assert shown["engine"]["kernels"] == "fake"
    assert shown["engine"]["blocks"] == 64
    assert without_credentials(endpoint) == f"https://{HIDDEN}@collector:4318/x?{HIDDEN}"


@pytest.mark.parametrize("text", ["s3://bucket/a@b", "hf://org/name@main", "/models/a?b@c", "https://host/path#a?b"])
def test_what_is_no_secret_of_a_url_is_shown(text: str) -> None:
    assert without_credentials(text) == text


def test_no_engine_is_told_as_none(server: LiveServer) -> None:
    shown = server.client.get("/config").json()
    assert shown["engine"]["max_model_len"] == server.services.max_model_len
