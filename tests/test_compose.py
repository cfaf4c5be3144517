"""compose.yaml and the Dockerfile: they start a service with valid options, on loopback, from files that exist."""

import json
import re
import shlex
import shutil
import subprocess
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from kernels.cpu.compiled.build import PREBUILT
from service.settings import child_environment, read

ROOT = Path(__file__).parent.parent
DOCKER_COMPOSE = (
    shutil.which("docker")
    and not subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


SERVERS = {"rootstock": "Dockerfile", "rootstock-gpu": "Dockerfile.cuda"}  # services of compose, and their images


@pytest.fixture(scope="module", params=SERVERS.values())
def dockerfile(request: pytest.FixtureRequest) -> list[tuple[str, str]]:
    """Instructions and what follows them, continued lines joined; of each image."""
    return instructions_of(request.param)


def instructions_of(name: str) -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.M).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def every_string(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [text for value in node.values() for text in every_string(value)]
    if isinstance(node, list):
        return [text for value in node for text in every_string(value)]
    return [node] if isinstance(node, str) else []


@pytest.mark.skipif(not DOCKER_COMPOSE, reason="docker compose is not installed, so it cannot check compose.yaml")
def test_docker_compose_accepts_the_file() -> None:
    command = ["docker", "compose", "--file", "compose.yaml", "config", "--quiet"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_there_is_a_service_a_store_and_a_job_that_makes_buckets(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {*SERVERS, "minio", "buckets"}
    assert services["rootstock"]["build"] == "."
    assert services["rootstock-gpu"]["build"] == {"context": ".", "dockerfile": SERVERS["rootstock-gpu"]}
    for name in ("minio", "buckets"):
        assert re.fullmatch(r"[a-z0-9./_-]+:[A-Za-z0-9._-]+", services[name]["image"]), "an image needs its version"
    for name in ("rootstock", "minio"):
        assert services[name]["healthcheck"]["test"][0] == "CMD"
        assert services[name]["restart"] == "unless-stopped"


def test_every_service_and_volume_that_is_named_exists(compose: dict[str, Any]) -> None:
    mounted = set()
    for service in compose["services"].values():
        for name, dependency in service.get("depends_on", {}).items():
            assert dependency["condition"] != "service_healthy" or "healthcheck" in compose["services"][name]
        mounted |= {volume.partition(":")[0] for volume in service.get("volumes", [])}
    assert mounted == set(compose["volumes"])


def test_ports_are_open_to_this_machine_only(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert ports
    assert all(re.fullmatch(r"127\.0\.0\.1:(\d+|\$\{[A-Z]+:-\d+\}):\d+", port) for port in ports)


def test_a_variable_has_the_same_default_wherever_it_is_used(compose: dict[str, Any]) -> None:
    defaults: dict[str, set[str]] = {}
    for text in every_string(compose):
        assert text.count("$") == len(re.findall(r"\$\{\w+:-[^}]*\}", text)), f"no default in {text}"
        for name, default in re.findall(r"\$\{(\w+):-([^}]*)\}", text):
            defaults.setdefault(name, set()).add(default)
    assert {name for name, values in defaults.items() if len(values) > 1} == set()
    service, store = (compose["services"][name]["environment"] for name in ("rootstock", "minio"))
    assert service["AWS_SECRET_ACCESS_KEY"] == store["MINIO_ROOT_PASSWORD"]
    assert service["AWS_ACCESS_KEY_ID"] == store["MINIO_ROOT_USER"]


def test_the_service_is_told_where_the_store_listens(compose: dict[str, Any]) -> None:
    endpoint = compose["services"]["rootstock"]["environment"]["AWS_ENDPOINT_URL_S3"]
    name, port = re.fullmatch(r"http://(\w+):(\d+)", endpoint).groups()
    assert any(mapping.endswith(f":{port}") for mapping in compose["services"][name]["ports"])


def test_the_service_is_started_with_settings_that_it_accepts(compose: dict[str, Any]) -> None:
    service = compose["services"]["rootstock"]
    program, flag, module, *options = shlex.split(service["command"])
    assert (program, flag, module) == ("python", "-m", "service")
    environment = {name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) for name, value in service["environment"].items()}
    settings = read(options, environment).settings(Path("/models/mine"), "mine")
    assert settings.store is not None
    assert settings.allowed_sources


def test_every_bucket_that_the_service_uses_is_made_before_it_starts(compose: dict[str, Any]) -> None:
    service, job = compose["services"]["rootstock"], compose["services"]["buckets"]
    assert service["depends_on"]["buckets"]["condition"] == "service_completed_successfully"
    verb, flag, *made = shlex.split(job["command"])
    assert (job["entrypoint"], verb, flag) == ("mc", "mb", "--ignore-existing")
    used = {service["environment"]["ROOTSTOCK_STORE"], *re.findall(r"s3://\S+", service["command"])}
    assert {f"s3://{bucket.removeprefix('store/')}" for bucket in made} == used
    store = compose["services"]["minio"]
    user, password = store["environment"]["MINIO_ROOT_USER"], store["environment"]["MINIO_ROOT_PASSWORD"]
    host = service["environment"]["AWS_ENDPOINT_URL_S3"].removeprefix("http://")
    assert job["environment"]["MC_HOST_store"] == f"http://{user}:{password}@{host}"
    assert job["image"] == store["image"], "it has the client, too"


def test_on_a_gpu_it_is_the_same_service_with_a_device_and_only_if_it_is_asked_for(compose: dict[str, Any]) -> None:
    services = compose["services"]
    on_gpu = dict(services["rootstock-gpu"])
    [device] = on_gpu.pop("deploy")["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])
    assert on_gpu.pop("profiles") == ["gpu"], "without the profile it does not start"
    assert on_gpu.pop("ulimits") == {"memlock": -1}, "host memory for adapters is page-locked"
    on_cpu = dict(services["rootstock"])
    assert on_gpu.pop("build") != on_cpu.pop("build")
    assert on_gpu == on_cpu


def test_the_image_for_a_gpu_has_what_triton_compiles_launchers_with() -> None:
    """A C compiler and the C library's headers; Python's headers are in Python's images. What is compiled is kept."""
    instructions = instructions_of("Dockerfile.cuda")
    [installed] = [rest for name, rest in instructions if name == "RUN" and "apt-get install" in rest]
    assert {"gcc", "libc6-dev"} <= set(shlex.split(installed))
    assert re.fullmatch(r"python:3\.\d+-slim", dict(instructions)["FROM"])
    assert any("'.[gpu]'" in rest for name, rest in instructions if name == "RUN")
    environment = dict(item.split("=") for item in shlex.split(dict(instructions)["ENV"]))
    assert any(environment["TRITON_CACHE_DIR"].startswith(place) for place in json.loads(dict(instructions)["VOLUME"]))
    assert read([], environment).settings(Path("/models/mine"), "mine").engine.device == "cuda"
    for name in ("PATH", "TRITON_CACHE_DIR", "NVIDIA_DRIVER_CAPABILITIES"):
        assert child_environment({name: "x"}), f"the engine gets no {name}"


def test_the_image_takes_the_kernels_of_a_stage_that_built_them_where_they_are_looked_for() -> None:
    dockerfile = instructions_of("Dockerfile")
    stage = next(rest for name, rest in dockerfile if name == "FROM")
    built = next(rest for name, rest in dockerfile if name == "RUN")
    assert stage.endswith(" AS kernels")
    assert built == f"python -m kernels.cpu.compiled.build {PREBUILT.relative_to(ROOT).as_posix()}"
    assert ("COPY", "--from=kernels /app/kernels kernels") in dockerfile


def test_what_the_image_copies_exists_and_is_not_ignored(dockerfile: list[tuple[str, str]]) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    copies = [rest for name, rest in dockerfile if name == "COPY" and not rest.startswith("--from=")]
    sources = [source for rest in copies for source in shlex.split(rest)[:-1]]
    assert {source for source in sources if not (ROOT / source).exists()} == set()
    for source in sources:
        ignored = False
        for rule in rules:
            if fnmatch(source, rule.removeprefix("!")):
                ignored = not rule.startswith("!")
        assert not ignored, f"{source} is copied but ignored"


def test_the_image_has_every_package_that_is_installed(dockerfile: list[tuple[str, str]]) -> None:
    copied = {shlex.split(rest)[0] for name, rest in dockerfile if name == "COPY"}
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"loadtests", "tools"}
    assert rooms <= copied


def test_the_image_runs_a_module_of_ours_as_another_user_than_root(dockerfile: list[tuple[str, str]]) -> None:
    instructions = dict(dockerfile)
    assert {name for name, _ in dockerfile} <= {
        "FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "VOLUME", "EXPOSE", "HEALTHCHECK", "CMD",
    }  # fmt: skip
    program, flag, module = json.loads(instructions["CMD"])
    assert (program, flag) == ("python", "-m")
    assert find_spec(f"{module}.__main__")
    assert instructions["USER"] not in ("root", "0")
    assert f"useradd --system --uid 10001 {instructions['USER']}" in " ".join(
        rest for name, rest in dockerfile if name == "RUN"
    )


def test_image_and_compose_ask_for_health_in_the_same_way(
    dockerfile: list[tuple[str, str]], compose: dict[str, Any]
) -> None:
    command = json.loads(dict(dockerfile)["HEALTHCHECK"].partition("CMD ")[2])
    assert compose["services"]["rootstock"]["healthcheck"]["test"] == ["CMD", *command]
    compile(command[-1], "healthcheck", "exec")
    port = dict(item.split("=") for item in shlex.split(dict(dockerfile)["ENV"]))["PORT"]
    assert f":{port}/health/ready" in command[-1]
    assert dict(dockerfile)["EXPOSE"] == port
