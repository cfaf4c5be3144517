"""What uploads may look like, and what hostile ones leave behind: nothing."""

import gzip
import io
import json
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from service.ingest import tar_body
from tests.service.adapters.adapter_bundles import CONFIG, WEIGHTS, bundle, config, multipart, tensors
from tests.service.adapters.adapter_service import MAX_UPLOAD_BYTES, Service, error, serving

TAR = {"Content-Type": "application/x-tar"}
GZIP = {"Content-Type": "application/gzip"}
SAFETENSORS = {"Content-Type": "application/vnd.safetensors"}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A service with one adapter; whatever a test uploads besides must leave it, and the disk, as they were."""
    with serving(tmp_path / "data") as running:
        running.put("neighbour", seed=99)
        yield running


def tar(*members: tarfile.TarInfo | tuple[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size, info.mtime = len(member[1]), 1.5  # Python writes a fraction as a pax header
                archive.addfile(info, io.BytesIO(member[1]))
    return stream.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def good_tar() -> bytes:
    config_file, weights = bundle()
    return tar((CONFIG, config_file), (WEIGHTS, weights))


BOTH = (CONFIG, WEIGHTS)
MORE = [("README.md", b"# A poet"), ("optimizer.pt", b"\x80\x02"), ("._" + WEIGHTS, b"\0"), ("training_args.bin", b"x")]


def run_folder(format: int = tarfile.PAX_FORMAT) -> bytes:
    """What `tar -c run` makes of a folder with checkpoints, whose adapters come first here."""
    older = zip(BOTH, (config(), save(tensors(seed=5))), strict=True)
    return tar(
        special("run/", tarfile.DIRTYPE),
        *((f"run/checkpoint-10/{name}", content) for name, content in (*MORE, *older)),
        special("run/latest", tarfile.SYMTYPE, "checkpoint-10"),
        *((f"run/{name}", content) for name, content in zip(BOTH, bundle(), strict=True)),
        (f"run/checkpoint-20/{CONFIG}", b"{}"),
        (f"run/runs/{'events' * 30}", b"x"),  # a long name
        *MORE,
        format=format,
    )


def put(service: Service, **request: Any) -> httpx.Response:
    return service.client.put("/adapters/poet", **request)


def refused(service: Service, **request: Any) -> tuple[int, str, str | None]:
    """Send an upload that must fail, and return its error; nothing else may have changed."""
    files, neighbour, engine = service.files(), service.get("neighbour"), dict(service.engine.registered)
    answer = error(put(service, **request))
    assert service.files() == files
    assert service.names() == ["neighbour"]
    assert service.get("neighbour") == neighbour
    assert service.engine.registered == engine
    assert answer[0] < 500
    return answer


def test_every_kind_of_body_gives_the_same_adapter(service: Service) -> None:
    config_file, weights = bundle()
    alone = save(tensors(), {"adapter_config": config_file.decode()})
    directory = special("./", tarfile.DIRTYPE)
    bodies: list[dict[str, Any]] = [
        {"files": multipart(config_file, weights)},
        {"files": [("files", (WEIGHTS, weights)), ("files", (CONFIG, config_file))]},
        {"files": {CONFIG: ("my.json", config_file), WEIGHTS: ("my.safetensors", weights)}},
        {"content": good_tar(), "headers": TAR},
        {"content": tar((WEIGHTS, weights), (CONFIG, config_file), format=tarfile.GNU_FORMAT), "headers": TAR},
        {"content": tar((WEIGHTS, weights), (CONFIG, config_file), format=tarfile.USTAR_FORMAT), "headers": TAR},
        {"content": tar(directory, (f"./{CONFIG}", config_file), (f"./{WEIGHTS}", weights)), "headers": TAR},
        {"content": alone, "headers": SAFETENSORS},
        {"content": gzip.compress(good_tar()), "headers": GZIP},
        {"content": gzip.compress(good_tar()[:700]) + gzip.compress(good_tar()[700:]) + b"\0" * 99, "headers": GZIP},
        {"content": gzip.compress(run_folder()), "headers": GZIP},
        {"content": run_folder(), "headers": TAR},
        {"content": run_folder(tarfile.GNU_FORMAT), "headers": TAR},
        {
            "files": [
                ("files", (f"run/{name}", content)) for name, content in (*MORE, *zip(BOTH, bundle(), strict=True))
            ]
        },
    ]

    digests = {put(service, **body).json()["digest"] for body in bodies}

    assert len(digests) == 1
    assert service.get("poet")["generation"] == 1


@pytest.mark.parametrize("piece", [1, 511, 513])
def test_a_body_may_come_in_pieces_of_any_size(service: Service, piece: int) -> None:
    def pieces(body: bytes) -> Iterator[bytes]:
        return (body[start : start + piece] for start in range(0, len(body), piece))

    form = httpx.Request("PUT", "http://x", files=multipart(*bundle()))
    by_form = put(service, content=pieces(form.read()), headers={"Content-Type": form.headers["Content-Type"]})
    by_tar = put(service, content=pieces(good_tar()), headers=TAR)

    assert (by_form.status_code, by_tar.status_code) == (201, 200)
    assert by_form.json() == by_tar.json()


def test_another_content_type_is_refused_and_the_accepted_ones_are_named(service: Service) -> None:
    for content_type in ("application/json", "application/zip", "text/plain; charset=utf-8", "nonsense"):
        headers = {"Content-Type": content_type}
        assert refused(service, content=b"x", headers=headers) == (415, "unsupported_media_type", "Content-Type")
    response = put(service, content=b"x")
    assert response.status_code == 415
    for accepted in ("multipart/form-data", "application/x-tar", "application/gzip", "application/vnd.safetensors"):
        assert accepted in response.json()["error"]["message"]


def test_a_part_whose_file_has_a_foreign_name_is_known_by_its_field(service: Service) -> None:
    foreign = {CONFIG: ("конфиг.json", b"{}"), WEIGHTS: ("日本.safetensors", b"x")}
    assert refused(service, files=foreign)[0] == 422, "the form is taken; what is in it is not"
    unnamed = {"配置": ("конфиг.json", b"{}")}
    assert refused(service, files=unnamed) == (400, "missing_file", CONFIG)


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "adapter_model-00001-of-00002.safetensors", "adapters.safetensors"]
)
def test_weights_in_another_form_are_named_with_the_command_that_converts_them(service: Service, name: str) -> None:
    for request in (
        {"files": {CONFIG: (CONFIG, b"{}"), name: (name, b"\x80\x02")}},
        {"content": tar((f"run/{CONFIG}", b"{}"), (f"run/{name}", b"\x80\x02")), "headers": TAR},
    ):
        assert refused(service, **request) == (400, "missing_file", WEIGHTS)
        message = put(service, **request).json()["error"]["message"]
        assert name in message
        assert "python -m service.convert" in message


def test_a_form_that_lacks_a_file_or_has_one_twice_is_refused_by_its_name(service: Service) -> None:
    files = [("files", (name, b"x")) for name in (CONFIG, WEIGHTS)]
    assert refused(service, files=[*files, files[0]]) == (400, "duplicate_file", CONFIG)
    assert refused(service, files=files[:1]) == (400, "missing_file", WEIGHTS)
    assert refused(service, files={CONFIG: (WEIGHTS, b"x")}) == (400, "invalid_multipart", CONFIG)


def part(name: str, content: bytes, *headers: str) -> bytes:
    lines = [f'Content-Disposition: form-data; name="{name}"; filename="{name}"', *headers]
    return b"--edge\r\n" + "\r\n".join(lines).encode() + b"\r\n\r\n" + content + b"\r\n"


FORM = part(CONFIG, bundle()[0]) + part(WEIGHTS, bundle()[1]) + b"--edge--\r\n"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", FORM),
        ("multipart/form-data; boundary=", FORM),
        ("multipart/form-data; boundary=other", FORM),
        ("multipart/form-data; boundary=" + "e" * 1000, FORM),
        ("multipart/form-data; boundary=edge", b""),
        ("multipart/form-data; boundary=edge", b"\xff" * 1000),
        ("multipart/form-data; boundary=edge", FORM[:20]),
        ("multipart/form-data; boundary=edge", FORM[:-5]),
        ("multipart/form-data; boundary=edge", FORM[:-30]),
        ("multipart/form-data; boundary=edge", FORM.replace(b"Content-Disposition:", b"Content Disposition:")),
        ("multipart/form-data; boundary=edge", FORM.replace(b"Content-Disposition:", b"X" * 50_000 + b":")),
        ("multipart/form-data; boundary=edge", FORM.replace(b"form-data;", b"form-data;\r\n" + b"A: b\r\n" * 1000, 1)),
        ("multipart/form-data; boundary=edge", part(CONFIG, b"e30=", "Content-Transfer-Encoding: base64") + FORM),
    ],
)
def test_a_broken_form_is_refused(service: Service, content_type: str, body: bytes) -> None:
    answer = refused(service, content=body, headers={"Content-Type": content_type})
    assert answer == (400, "invalid_multipart", "Content-Type" if content_type.partition("=")[2] == "" else None)


def test_a_nameless_part_is_no_file(service: Service) -> None:
    body = b"--edge\r\nContent-Type: text/plain\r\n\r\nx\r\n--edge--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=edge"}
    assert refused(service, content=body, headers=headers) == (400, "missing_file", CONFIG)


@pytest.mark.parametrize(
    ("member", "code", "param"),
    [
        (special(CONFIG, tarfile.SYMTYPE, "/etc/passwd"), "invalid_archive", CONFIG),
        (special(CONFIG, tarfile.LNKTYPE, WEIGHTS), "invalid_archive", CONFIG),
        (special(CONFIG, tarfile.CHRTYPE), "invalid_archive", CONFIG),
        (special(CONFIG, tarfile.BLKTYPE), "invalid_archive", CONFIG),
        (special(CONFIG, tarfile.FIFOTYPE), "invalid_archive", CONFIG),
        (special(CONFIG, tarfile.DIRTYPE), "invalid_archive", CONFIG),
        (special(f"folder/{CONFIG}", tarfile.SYMTYPE, "/etc/passwd"), "invalid_archive", f"folder/{CONFIG}"),
        (special(CONFIG, b"Z"), "invalid_archive", CONFIG),
        ((f"/{CONFIG}", b"x"), "invalid_archive", f"/{CONFIG}"),
        ((f"../{CONFIG}", b"x"), "invalid_archive", f"../{CONFIG}"),
        ((f"a/../{CONFIG}", b"x"), "invalid_archive", f"a/../{CONFIG}"),
        (("../README.md", b"x"), "invalid_archive", "../README.md"),
        ((WEIGHTS, b"x"), "duplicate_file", WEIGHTS),
        (("n" * 200 + "/../x", b"x"), "invalid_archive", "n" * 120 + "…"),  # a long name, in a pax header
    ],
)
def test_an_archive_with_a_strange_member_is_refused_by_its_name(
    service: Service, member: tarfile.TarInfo | tuple[str, bytes], code: str, param: str | None
) -> None:
    config_file, weights = bundle()
    body = tar((WEIGHTS, weights), member, (CONFIG, config_file))
    assert refused(service, content=body, headers=TAR) == (400, code, param)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(*records: bytes) -> bytes:
    content = b"".join(records)
    return header("pax", len(content), tarfile.XHDTYPE) + content + b"\0" * (-len(content) % 512)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0" * 1024,
        good_tar()[:100],
        good_tar()[:512],
        good_tar()[:1500],
        b"\x1f\x8b" + b"x" * 2000,
        b"x" * 512,
        good_tar()[:1000] + b"\xff" + good_tar()[1001:1024] + b"\xff" * 2000,
        good_tar() + good_tar(),
        pax(b"17 path=whatever\n") + good_tar(),
        pax(b"13 size=1000\n") + good_tar(),
        pax(b"26 GNU.sparse.major=1.0..\n") + good_tar(),
        pax(b"99999 mtime=1\n") + good_tar(),
        pax(b"-5 mtime=1\n") + good_tar(),
        pax(b"0 mtime=1\n") + good_tar(),
        pax(b"no length") + good_tar(),
        header("pax", 100_000, tarfile.XHDTYPE) + b"x" * 100_352,
        header("x" * 80, 10, tarfile.GNUTYPE_LONGNAME) + b"y" * 10 + b"\0" * 502 + good_tar(),
        header(WEIGHTS, 10, tarfile.GNUTYPE_SPARSE) + b"\0" * 512,
        header("folder", 10, tarfile.DIRTYPE) + b"\0" * 512 + good_tar(),
        header(WEIGHTS, -5),
    ],
)
def test_a_broken_or_crafted_archive_is_refused(service: Service, body: bytes) -> None:
    status, code, _ = refused(service, content=body, headers=TAR)
    assert (status, code) in [(400, "invalid_archive"), (400, "missing_file")]


def test_an_archive_may_have_hundreds_of_members_and_no_more(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(service, content=header("x", 0) * 300, headers=TAR) == (400, "missing_file", CONFIG)
    monkeypatch.setattr(tar_body, "MAX_ENTRIES", 299)
    assert refused(service, content=header("x", 0) * 300, headers=TAR) == (400, "invalid_archive", None)


@pytest.mark.parametrize(
    "body",
    [
        b"x" * 1000,
        gzip.compress(good_tar())[:-9],
        gzip.compress(good_tar())[:200],
        gzip.compress(good_tar()) + b"x",
        gzip.compress(good_tar()[:1500]),
        gzip.compress(b"x" * 512),
        gzip.compress(gzip.compress(good_tar())),
        b"",
    ],
    ids=["no gzip", "no end", "cut", "more after it", "half a tar", "no tar", "gzip in gzip", "nothing"],
)
def test_broken_gzip_is_refused(service: Service, body: bytes) -> None:
    status, code, _ = refused(service, content=body, headers=GZIP)
    assert (status, code) in [(400, "invalid_archive"), (400, "missing_file")]


@pytest.mark.parametrize("name", ["README.md", WEIGHTS])
def test_an_archive_that_expands_without_end_is_refused_at_the_limit(service: Service, name: str) -> None:
    bomb = gzip.compress(header(name, MAX_UPLOAD_BYTES * 4) + b"\0" * MAX_UPLOAD_BYTES * 4)
    assert len(bomb) < MAX_UPLOAD_BYTES // 50
    status, code, _ = refused(service, content=bomb, headers=GZIP)
    assert (status, code) == (413, "body_too_large")


def test_two_adapters_side_by_side_are_not_one(service: Service) -> None:
    both = zip(BOTH, bundle(), strict=True)
    body = tar(*((f"{folder}/{name}", content) for name, content in both for folder in ("one", "two")))
    assert refused(service, content=body, headers=TAR) == (400, "invalid_archive", CONFIG)
    assert "one and two" in put(service, content=body, headers=TAR).json()["error"]["message"]


def test_an_archive_that_claims_more_than_the_limit_is_refused_at_its_header(service: Service) -> None:
    for name, size in ((WEIGHTS, 1 << 40), (WEIGHTS, MAX_UPLOAD_BYTES + 1), (CONFIG, (1 << 20) + 1)):
        assert refused(service, content=header(name, size), headers=TAR) == (413, "body_too_large", name)


def test_a_body_over_the_limit_is_refused_whatever_its_headers_say(service: Service) -> None:
    too_much = b"\0" * (MAX_UPLOAD_BYTES + 1)
    honest: dict[str, Any] = {"content": too_much, "headers": SAFETENSORS}
    chunked: dict[str, Any] = {"content": iter([too_much[:-1], b"\0"]), "headers": SAFETENSORS}
    form: dict[str, Any] = {"files": multipart(config(), too_much)}
    for request in (honest, chunked, form):
        assert refused(service, **request) == (413, "body_too_large", None)


@pytest.mark.parametrize(
    ("config_file", "weights", "param"),
    [
        (b"{", save(tensors()), "adapter_config"),
        (b"[]", save(tensors()), "adapter_config"),
        (config(peft_type="VERA"), save(tensors()), "peft_type"),
        (config(use_dora=True), save(tensors()), None),
        (config(rank=9), save(tensors(rank=9)), "r"),
        (config(lora_alpha=-1), save(tensors()), "lora_alpha"),
        (config(lora_alpha=float("nan")), save(tensors()), "adapter_config"),
        (config(), b"", "weights"),
        (config(), b"GGUF" + b"\xff" * 100, "weights"),
        (config(), save(tensors())[:-1], "weights"),
        (config(), save(tensors()) + b"x", "weights"),
        (config(), save({}), None),
        (config(), save(tensors(module="nothing_proj")), None),
        (config(), save(tensors(out=17)), None),
        (config(), save(tensors(rank=3)), None),
        (config(), save({name: tensor * np.nan for name, tensor in tensors().items()}), None),
        (config(), save(dict(list(tensors().items())[:1])), None),
    ],
)
def test_an_adapter_that_would_not_apply_exactly_is_refused(
    service: Service, config_file: bytes, weights: bytes, param: str | None
) -> None:
    status, code, field = refused(service, files=multipart(config_file, weights))
    assert (status, code) == (422, "invalid_adapter")
    assert field == param if param else field


def test_every_way_of_uploading_takes_an_alora(service: Service) -> None:
    config_file, weights = config(alora_invocation_tokens=[1, 2]), save(tensors())
    bodies: list[dict[str, Any]] = [
        {"files": multipart(config_file, weights)},
        {"content": tar((CONFIG, config_file), (WEIGHTS, weights)), "headers": TAR},
        {"content": save(tensors(), {"adapter_config": config_file.decode()}), "headers": SAFETENSORS},
    ]
    for body in bodies:
        response = put(service, **body)
        assert response.status_code in (200, 201), response.text
        assert (response.json()["kind"], response.json()["invocation_tokens"]) == ("alora", [1, 2])
    assert service.get("poet")["generation"] == 1


def test_an_alora_of_the_old_format_is_told_how_to_convert(service: Service) -> None:
    files = multipart(config(invocation_string="<|start|>check"), save(tensors()))
    assert refused(service, files=files) == (422, "invalid_adapter", "invocation_string")
    message = put(service, files=files).json()["error"]["message"]
    assert "alora_invocation_tokens = tokenize(invocation_string)[1:]" in message


def test_a_bare_safetensors_file_must_carry_its_configuration(service: Service) -> None:
    for body in (save(tensors()), save(tensors(), {"format": "pt"})):
        assert refused(service, content=body, headers=SAFETENSORS) == (422, "invalid_adapter", "__metadata__")
    twice = json.dumps({"__metadata__": {"adapter_config": "{}"}}).replace("}}", '}, "__metadata__": {}}').encode()
    body = len(twice).to_bytes(8, "little") + twice
    assert refused(service, content=body, headers=SAFETENSORS)[:2] == (422, "invalid_adapter")


def send(service: Service, head: str, body: bytes = b"") -> socket.socket:
    connection = socket.create_connection(service.address, timeout=20)
    connection.sendall(f"PUT /adapters/poet HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode() + body)
    return connection


def test_a_client_that_hangs_up_leaves_nothing(service: Service) -> None:
    files = service.files()
    body = good_tar() + b"\0" * 100_000
    for content_type, cut in (("application/x-tar", 700), ("application/vnd.safetensors", 3000)):
        head = f"Content-Type: {content_type}\r\nContent-Length: {len(body)}"
        with send(service, head, body[:cut]) as connection:
            service.eventually(lambda: len(list(service.directory.glob(".scratch/*/*"))) == 1)
            connection.shutdown(socket.SHUT_WR)
        service.eventually(lambda: list(service.directory.glob(".scratch/*/*")) == [])
    assert service.files() == files
    assert service.names() == ["neighbour"]


def test_a_refused_upload_is_never_asked_for_its_body(service: Service) -> None:
    waits = "Expect: 100-continue\r\nContent-Length: 1000"
    too_large = f"Expect: 100-continue\r\nContent-Length: {MAX_UPLOAD_BYTES + 1}\r\nContent-Type: application/x-tar"
    for head, status in ((waits, b"415"), (too_large, b"413"), (waits + '\r\nIf-Match: "x"', b"412")):
        with send(service, head) as connection:
            assert connection.recv(12) == b"HTTP/1.1 " + status


def test_a_client_that_waits_to_be_asked_for_its_body_is_asked(service: Service) -> None:
    body = good_tar()
    head = f"Expect: 100-continue\r\nContent-Type: application/x-tar\r\nContent-Length: {len(body)}"
    with send(service, head) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert connection.recv(12) == b"HTTP/1.1 201"
    assert service.get("poet")["generation"] == 1
