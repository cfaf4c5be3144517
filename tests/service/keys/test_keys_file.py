"""The file of keys and its program: made, listed, revoked, and read again by a service that runs."""

import hmac
import json
import logging
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from service.errors import RequestError
from service.keys import keys as reloading
from service.keys.__main__ import main
from service.keys.keys import Keys
from service.keys.keys_file import KeysFileError, hash_of, id_of, read_keys, write_keys
from tests.service.keys.keyed_server import Client, keyed_server, record, refusal
from tests.service.live_server import wait_until

Run = Callable[..., str]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def run(file: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The program on the file; returns what it prints."""

    def run(*argv: str) -> str:
        main([*argv, "--keys-file", str(file)], {})
        return capsys.readouterr().out

    return run


def refused(run: Run, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        run(*argv)
    assert end.value.code == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("rootstock: ")
    return sentence.removeprefix("rootstock: ")


def test_a_new_key_is_printed_once_and_the_file_has_its_hash(run: Run, file: Path) -> None:
    options = ("--scopes", "generate,manage", "--adapter-prefix", "red/", "--requests-per-minute", "600")
    options += ("--tokens-per-minute", "90000", "--concurrent-requests", "8", "--disk-bytes", "1G")
    key = run("add", "red", *options, "--pinned-bytes", "64M").strip()
    assert (len(key) > 40, key.isascii(), id_of(key)) == (True, True, "red")
    assert key.split("_", 2)[2] not in file.read_text()
    [found] = read_keys(file)
    assert found == record(
        "red",
        key,
        scopes=["generate", "manage"],
        adapter_prefix="red/",
        requests_per_minute=600,
        tokens_per_minute=90000,
        concurrent_requests=8,
        disk_bytes=1 << 30,
        pinned_bytes=64 << 20,
        created_at=found.created_at,
    )
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert run("add", "red-2").strip() != key
    assert Keys(None, file).caller(f"Bearer {key}").id == "red"


def test_keys_are_listed_without_what_could_be_guessed_from_and_revoked(run: Run, file: Path) -> None:
    key = run("add", "red", "--disk-bytes", "0", "--scopes", "manage").strip()
    run("add", "blue")
    file.chmod(0o640)
    lines = run("list").splitlines()
    assert lines == ["red  manage  disk_bytes=0", "blue  generate"]
    run("revoke", "red")
    assert [each.id for each in read_keys(file)] == ["blue"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o640, "it stays as its owner has set it"
    assert [path.name for path in file.parent.iterdir()] == ["keys.json"]
    assert run("add", "red").strip() != key


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (("add", "schlüssel"), "an id is 1 to 64 lower-case letters"),
        (("add", "Red"), "an id is 1 to 64 lower-case letters"),
        (("add", "a_b"), "an id is 1 to 64 lower-case letters"),
        (("add", "api-key"), "is that of the option --api-key"),
        (("add", "taken"), "there is a key 'taken': revoke it first"),
        (("add",), "list takes no id, add and revoke take one"),
        (("list", "taken"), "list takes no id, add and revoke take one"),
        (("revoke", "nobody"), "there is no key 'nobody' in"),
        (("revoke", "taken", "--scopes", "admin"), "revoke takes no --scopes: only add does"),
        (
            ("add", "new", "--scopes", "everything"),
            "invalid choice: 'everything' is not one of generate, manage, admin",
        ),
        (("add", "new", "--scopes", ","), "scopes"),
        (("add", "new", "--adapter-prefix", "red/ "), "is not how a name of an adapter begins"),
        (("add", "new", "--adapter-prefix", "é"), "is not how a name of an adapter begins"),
        (("add", "new", "--scopes", "admin", "--adapter-prefix", "red/"), "scope admin sees all adapters"),
        (("add", "new", "--requests-per-minute", "0"), "requests_per_minute"),
        (("add", "new", "--disk-bytes", "much"), "'much' is not a number of bytes"),
        (("take", "new"), "invalid choice: 'take'"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_sentence_and_changes_nothing(
    run: Run, file: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], complaint: str
) -> None:
    run("add", "taken")
    before = file.read_bytes()
    assert complaint in refused(run, capsys, *argv)
    assert file.read_bytes() == before


def test_a_file_must_be_named(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    with pytest.raises(SystemExit):
        main(["list"], {})
    assert "--keys-file FILE, or ROOTSTOCK_KEYS_FILE" in capsys.readouterr().err
    main(["add", "red"], {"ROOTSTOCK_KEYS_FILE": str(file)})
    assert [each.id for each in read_keys(file)] == ["red"]


ONE = {"id": "red", "hash": "0" * 64, "scopes": ["generate"], "created_at": 0.0}
BROKEN = {
    "no JSON": "{",
    "not UTF-8": b"\xff",
    "a misspelt limit": {"keys": [{**ONE, "request_per_minute": 1}]},
    "a scope that is none": {"keys": [{**ONE, "scopes": ["all"]}]},
    "no scope": {"keys": [{**ONE, "scopes": []}]},
    "an id twice": {"keys": [ONE, ONE]},
    "a key in place of a hash": {"keys": [{**ONE, "hash": "rk_red_secret"}]},
    "an admin with a prefix": {"keys": [{**ONE, "scopes": ["admin"], "adapter_prefix": "red/"}]},
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_with_its_name(file: Path, content: object) -> None:
    file.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    if isinstance(content, dict):
        file.write_text(json.dumps(content))
    with pytest.raises(KeysFileError, match=r"keys\.json is no keys file"):
        Keys(None, file)


def test_a_file_that_is_missing_is_refused(file: Path) -> None:
    with pytest.raises(KeysFileError, match=r"keys\.json cannot be read: No such file"):
        Keys(None, file)


def test_a_running_service_follows_the_file(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reloading, "RELOAD_SECONDS", 0.02)
    caplog.set_level(logging.INFO, "service.keys.keys")

    def logged(text: str) -> bool:
        return any(text in each.getMessage() for each in list(caplog.records))

    with keyed_server(tiny_model, tmp_path, {"first": {}, "second": {}}) as server, Client(server.live.url, "") as new:
        [first, second] = read_keys(server.file)
        write_keys(server.file, [first, second, record("third", "rk_third_a-secret")])
        new.headers["authorization"] = "Bearer rk_third_a-secret"
        wait_until(lambda: new.get("/v1/models").status_code == 200)
        server.file.write_text('{"keys": [')
        wait_until(lambda: logged("is no keys file"))
        assert logged("the keys of before stay valid")
        server.file.unlink()
        wait_until(lambda: logged("cannot be read"))
        assert [client.get("/v1/models").status_code for client in (server["first"], new)] == [200, 200]
        write_keys(server.file, [record(second.id, "rk_second_b", requests_per_minute=1), first])
        wait_until(lambda: new.get("/v1/models").status_code == 401)
        assert refusal(server["second"].get("/v1/models")) == (401, "invalid_api_key"), "its id has another key"
        server["second"].headers["authorization"] = "Bearer rk_second_b"
        assert [server["second"].get("/v1/models").status_code for _ in range(2)] == [200, 429]
        assert server["first"].get("/v1/models").status_code == 200
    assert sum("is no keys file" in each.getMessage() for each in caplog.records) == 1, "once for each change"
    assert logged("the key third is revoked")
    assert "secret" not in caplog.text
    assert hash_of("rk_third_a-secret") not in caplog.text


def test_a_key_is_never_found_by_a_part_of_it(file: Path) -> None:
    write_keys(file, [record("red", "rk_red_abc")])
    keys = Keys("the option's", file)
    for wrong in (
        "rk_red_ab",
        "rk_red_abcd",
        "rk_red_",
        "rk__abc",
        "red_abc",
        "abc",
        "rk_red_abc rk_red_abc",
        "the option",
    ):
        with pytest.raises(Exception, match="the API key is not valid"):
            keys.caller(f"Bearer {wrong}")
    assert keys.caller("bearer  rk_red_abc ").id == "red"
    assert keys.caller("Bearer the option's").id == "api-key"


class Guarded(str):
    """The hash of a key that was sent: any comparison whose time depends on what is equal in it fails."""

    def _compared(self, *_: object) -> NoReturn:
        raise AssertionError("a hash is compared in a time that tells how much of it is right")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = startswith = find = index = count = _compared
    __hash__ = _compared  # of a look-up in a table, which compares then


def test_hashes_are_compared_in_a_time_that_tells_nothing_and_as_many_for_every_wrong_key(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_keys(file, [record("red", "rk_red_abc"), record("blue", "rk_blue_abc")])
    keys = Keys("option", file)
    compared: list[int] = []

    def compare_digest(one: str, other: str) -> bool:
        compared.append(len(one) + len(other))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(reloading, "hash_of", lambda key: Guarded(hash_of(key)))
    monkeypatch.setattr(reloading, "hmac", SimpleNamespace(compare_digest=compare_digest))
    wrong = ["rk_red_abd", "rk_red_xyz", "rk_nobody_abc", "rk_red", "optiom", "other", "o" * 4000]
    for key in wrong:  # of a known id, of an unknown one, and of none
        with pytest.raises(RequestError, match="the API key is not valid"):
            keys.caller(f"Bearer {key}")
    assert compared == [2 * 64] * 2 * len(wrong), "two hashes of one length, whatever the key is"
    assert [keys.caller(f"Bearer {key}").id for key in ("rk_red_abc", "rk_blue_abc", "option")] == [
        "red",
        "blue",
        "api-key",
    ]
