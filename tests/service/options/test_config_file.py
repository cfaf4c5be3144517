"""Options from a TOML file: their names, their types, and which of file, variable and command line wins."""

import tomllib
from pathlib import Path

import pytest

from service import collect
from service.options.table import HEAD
from service.settings import Arguments, all_options, read
from storage.local import LocalStore

MIB = 1024 * 1024


def given(tmp_path: Path, text: str, *argv: str, **environment: str) -> Arguments:
    file = tmp_path / "rootstock.toml"
    file.write_text(text)
    return read(["--config", str(file), *argv], environment)


def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> str:
    """The sentence that a file is refused with, without the file's name."""
    with pytest.raises(SystemExit) as end:
        given(tmp_path, text)
    assert end.value.code == 2
    [sentence] = capsys.readouterr().err.splitlines()
    begin = f"rootstock: {tmp_path / 'rootstock.toml'}"
    assert sentence.startswith(begin)
    return sentence.removeprefix(begin).lstrip(": ")


def test_options_have_their_names_and_aliases_with_either_dash(tmp_path: Path) -> None:
    text = """
        model = "org/name"
        max-num-seqs = 8
        max_batch_tokens = 64
        kv-cache-bytes = "64M"
        responses_store_bytes = 1048576
        refresh-seconds = 1
        drain-seconds = 0.25
        prefix-cache = false
        allow-source = ["s3://bucket-a", "hf://org"]
        data-directory = "/data"
        dtype = "float32"
    """
    arguments = given(tmp_path, text)
    found = arguments.settings(Path("/models/mine"), "mine")
    assert arguments.model == "org/name"
    assert (found.engine.max_running, found.engine.max_batch_tokens) == (8, 64)
    assert (found.engine.kv_cache_bytes, found.responses_store_bytes) == (64 * MIB, MIB)
    assert (found.refresh_seconds, found.drain_seconds) == (1.0, 0.25)
    assert found.engine.prefix_cache is False
    assert found.allowed_sources == ("s3://bucket-a", "hf://org")
    assert (found.data_directory, found.engine.dtype) == (Path("/data"), "float32")


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    text = 'port = 1\nhost = "::1"\nmax-uploads = 2\n'
    arguments = given(tmp_path, text, "--port", "3", ROOTSTOCK_PORT="2", HOST="127.0.0.2")
    found = arguments.settings(Path("/models/mine"), "mine")
    assert (found.port, found.host, found.max_uploads, found.max_connections) == (3, "127.0.0.2", 2, 1024)
    wanted = {"config": "command line", "port": "command line", "host": "environment", "max_uploads": "file"}
    assert found.sources == wanted


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text("port = 1")
    assert read([], {"ROOTSTOCK_CONFIG": str(tmp_path / "one.toml")}).values["port"] == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("max-runing = 8", "max-runing is no option: do you mean max-running?"),
        ("kv_cache_byte = 8", "kv_cache_byte is no option: do you mean kv-cache-bytes?"),
        ("zzz = 8", "zzz is no option: do you mean "),
        ("max-loras = 4", "max-loras: device memory for adapters is counted in bytes"),
        ("[server]\nport = 1", "server is no option"),
        ('config = "other.toml"', "config cannot be set here"),
        ("max-running = 8\nmax_num_seqs = 8", "max-running and max_num_seqs are the same option: set one"),
        ('max-running = "eight"', "max-running: expected a whole number, not a text"),
        ("max-running = true", "max-running: expected a whole number, not true or false"),
        ("max-running = 8.0", "max-running: expected a whole number, not a number"),
        ("max-running = 0", "max-running: must be at least 1, not 0"),
        ("max-running = -1", "max-running: '-1' is not a whole number of 0 or more"),
        ("prefix-cache = 1", "prefix-cache: expected true or false, not a whole number"),
        ("drain-seconds = nan", "drain-seconds: 'nan' is not a number of seconds"),
        ("drain-seconds = true", "drain-seconds: expected a number, not true or false"),
        ("drain-seconds = 2026-01-01", "drain-seconds: expected a number, not a time"),
        ("kv-cache-bytes = 1.5", 'kv-cache-bytes: expected bytes, such as 1048576 or "512M", not a number'),
        ('kv-cache-bytes = "2T"', "kv-cache-bytes: '2T' is not a number of bytes"),
        ('allow-source = "hf://org"', "allow-source: expected a list of texts, not a text"),
        ("allow-source = [1]", "allow-source: expected a list of texts, not one with other items"),
        ('dtype = "int8"', "dtype: invalid choice: 'int8' is not one of auto"),
        ("model = {}", "model: expected a text, not a table"),
        ("api-key = 12345678", "api-key: expected a text, not a whole number"),
        ("port = \n", "is no TOML: Invalid value (at line 1"),
    ],
)
def test_what_is_no_option_or_no_value_is_refused_by_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, sentence: str
) -> None:
    found = refusal(tmp_path, capsys, text)
    assert found.startswith(sentence)
    assert "12345678" not in found


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read(["--config", str(tmp_path / "none.toml")], {})
    assert "none.toml cannot be read: No such file or directory" in capsys.readouterr().err


def test_the_collector_reads_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LocalStore(tmp_path / "data").close()
    (tmp_path / "rootstock.toml").write_text(f'data-directory = "{tmp_path / "data"}"\nmax-running = 8\n')
    collect.main(["--config", str(tmp_path / "rootstock.toml"), "--dry-run"], {})
    assert capsys.readouterr().out == "would delete 0 files of 0 bytes\n"


def test_the_page_of_options_is_what_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        read(["--help-table"], {})
    assert end.value.code == 0
    page = capsys.readouterr().out
    written = (Path(__file__).parents[3] / "docs" / "options.md").read_text()
    assert page == written, "run `make openapi`"
    for option in all_options():
        [row] = [line for line in page.splitlines() if line.startswith(f"| `--{option.name}`")]
        assert row.count("|") - row.count(r"\|") == 6
        assert f"`{option.variables[0]}`" in row


def test_the_file_on_the_page_of_options_is_accepted(tmp_path: Path) -> None:
    text = HEAD.split("```toml\n")[1].split("```")[0]
    assert len(tomllib.loads(text)) == len(given(tmp_path, text).sources) - 1
