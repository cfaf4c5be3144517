"""The house rules that a machine can hold: which room imports which, who reads the environment, how long a file is."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("service", "runtime", "kernels", "storage", "loadtests", "openapi")
MAX_LINES = 450
MAX_FILES = 15

# What each room may import of ours, and which libraries; the standard library is open to all.
OURS = {
    "kernels": {"kernels"},
    "storage": {"storage"},
    "runtime": {"runtime", "kernels"},
    "service": {"service", "runtime", "storage"},
    "openapi": {"openapi", "service"},
    "loadtests": {"loadtests"},
}
LIBRARIES = {
    "kernels": {"torch", "triton", "numpy"},
    "storage": {"msgspec", "boto3", "botocore", "s3transfer", "huggingface_hub", "blake3"},
    "runtime": {"torch", "numpy", "safetensors", "msgspec", "blake3", "zmq", "llguidance", "tqdm"},
    "service": {
        "starlette",
        "uvicorn",
        "httptools",
        "python_multipart",
        "msgspec",
        "transformers",
        "tokenizers",
        "huggingface_hub",
        "jinja2",
        "zmq",
        "blake3",
        "prometheus_client",
        "llguidance",
        "opentelemetry",  # where traces are asked for
        "ray",  # for service.ray alone
    },
    "openapi": {"msgspec", "starlette"},
    "loadtests": {
        "httpx",
        "locust",
        "gevent",
        "numpy",
        "boto3",
        "botocore",
        "torch",
        "transformers",
        "peft",
        "safetensors",
    },
}
# What an inner room may import of its own tree, besides itself: other inner rooms, and files of the outer room.
INNER = {
    "service.keys": {
        "service.access",
        "service.errors",
        "service.http",
        "service.options",
        "service.settings",
    },
    "service.door": {"service.errors", "service.http", "service.logs", "service.settings"},
    "service.engine": {"service.errors", "service.metrics"},
    "service.options": {"service.settings"},
    "service.traces": {"service.access", "service.http"},
    "service.catalog": {
        "service.engine",
        "service.keys.caller",
        "service.errors",
        "service.logs",
        "service.metrics",
        "service.settings",
        "service.source_urls",
    },
    "service.ingest": {"service.catalog.record", "service.errors", "service.source_urls"},
    "service.page": {"service.errors", "service.http"},
    "service.ray": {
        "service.app",
        "service.configure",
        "service.door",
        "service.errors",
        "service.http",
        "service.routing",
        "service.services",
    },
    "service.sandbox": set(),
    "service.routing": {
        "service.catalog.seen",
        "service.door.gate",
        "service.http",
        "service.keys.caller",
        "service.services",
    },
    "service.grammars": {"service.errors", "service.sandbox"},
    "service.openai": {
        "service.engine",
        "service.grammars",
        "service.tool_calls",
        "service.text",
        "service.catalog.record",
        "service.catalog.mixes",
        "service.catalog.seen",
        "service.keys.caller",
        "service.keys.limits",
        "service.access",
        "service.errors",
        "service.http",
        "service.metrics",
        "service.routing.heads",
        "service.services",
        "service.traces.stages",
    },
    "service.responses": {
        "service.openai",
        "service.keys.caller",
        "service.errors",
        "service.http",
        "service.services",
    },
    "service.dialects": {
        "service.openai",
        "service.catalog.record",
        "service.errors",
        "service.http",
        "service.services",
    },
    "service.convert": {"service.text", "service.logs"},
    "service.tool_calls": set(),
    "service.text": {"service.tool_calls", "service.sandbox"},
    "service.kv": {
        "service.engine",
        "service.catalog.record",
        "service.catalog.seen",
        "service.catalog.versions",
        "service.keys.caller",
        "service.openai",
        "service.errors",
        "service.http",
        "service.metrics",
        "service.services",
    },
    "service.adapters": {
        "service.catalog",
        "service.ingest",
        "service.keys.caller",
        "service.text",
        "service.access",
        "service.errors",
        "service.http",
        "service.logs",
        "service.services",
        "service.source_urls",
    },
    "runtime.quantization": set(),
    "runtime.models": {"runtime.quantization", "runtime.output", "runtime.parallel"},
    "runtime.output": {"runtime.config"},
    "runtime.adapter_format": {"runtime.models", "runtime.config"},
    "runtime.conversion": {"runtime.adapter_format", "runtime.output"},
    "runtime.parallel": {"runtime.config"},
    "runtime.follower": {
        "runtime.adapter_format",
        "runtime.adapters",
        "runtime.config",
        "runtime.cpu.choice",
        "runtime.kv",
        "runtime.messages",
        "runtime.output",
        "runtime.parallel",
        "runtime.parent",
        "runtime.request",
        "runtime.runner",
        "runtime.scheduler",
    },
    "runtime.adapters": {
        "runtime.adapter_format",
        "runtime.models",
        "runtime.parallel",
        "runtime.background",
        "runtime.messages",
    },
    "runtime.grammar": {"runtime.background", "runtime.messages"},
    "runtime.kv": {
        "runtime.models.config",
        "runtime.parallel",
        "runtime.background",
        "runtime.messages",
        "runtime.request",
    },
    "runtime.cpu": {
        "runtime.adapters",
        "runtime.models",
        "runtime.parallel",
        "runtime.quantization",
        "runtime.config",
        "runtime.request",
        "runtime.runner",
        "runtime.sampler",
        "runtime.scheduler",
    },
    "runtime.gpu": {
        "runtime.adapters",
        "runtime.models",
        "runtime.parallel",
        "runtime.quantization",
        "runtime.config",
        "runtime.messages",
        "runtime.request",
        "runtime.runner",
        "runtime.sampler",
        "runtime.scheduler",
    },
    "kernels.cpu": set(),
    "kernels.cpu.compiled": set(),
    "kernels.reference": {"kernels"},
    "kernels.tune": {"kernels"},
}
# Inner rooms that only programs import, and one place that says why.
ONLY_THEMSELVES = {"kernels.tune", "service.ray"}
# The second one looks for the user's compiler and cache, also where the engine is used as a library; the third
# one tells oneDNN the size of its caches, which has no other way to know.
ENVIRONMENT_READERS = {"service/settings.py", "kernels/cpu/compiled/build.py", "kernels/cpu/onednn.py"}


def sources(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it; a relative import counts as one of its own room."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module if node.level == 0 and node.module else name_of(path).split("/")[0]


def within(module: str, place: str) -> bool:
    return module == place or module.startswith(f"{place}.")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_place_allows(room: str) -> None:
    allowed = OURS[room] | LIBRARIES[room] | sys.stdlib_module_names
    found = {(name_of(path), module) for path in sources(room) for module in imports(path)}
    assert found, f"{room} imports nothing at all: is it looked for in the right place?"
    assert {(path, module) for path, module in found if module.split(".")[0] not in allowed} == set()


@pytest.mark.parametrize("room", INNER)
def test_an_inner_room_imports_only_what_its_place_allows(room: str) -> None:
    allowed = {room, *INNER[room]}
    found = {(name_of(path), module) for path in sources(room.replace(".", "/")) for module in imports(path)}
    assert found, f"{room} imports nothing at all: is it looked for in the right place?"
    own = {(path, module) for path, module in found if module.split(".")[0] == room.split(".")[0]}
    assert {(path, module) for path, module in own if not any(within(module, place) for place in allowed)} == set()


def test_every_inner_room_has_its_rule() -> None:
    rooms = {path.parent for path in sources("service", "runtime", "kernels") if path.parent.parent != ROOT}
    assert {name_of(room).replace("/", ".") for room in rooms} == INNER.keys()


def test_nothing_that_serves_imports_a_program() -> None:
    found = {(name_of(path), module) for path in sources("service", "runtime", "kernels") for module in imports(path)}
    for program in ONLY_THEMSELVES:
        outside = {(path, module) for path, module in found if not within(path.replace("/", "."), program)}
        assert {(path, module) for path, module in outside if within(module, program)} == set()


def test_no_folder_is_longer_than_a_screen() -> None:
    folders: dict[str, int] = {}
    for path in sources(*ROOMS):
        if path.name != "__init__.py":
            folders[name_of(path.parent)] = folders.get(name_of(path.parent), 0) + 1
    assert {folder: count for folder, count in folders.items() if count > MAX_FILES} == {}


def test_the_service_runs_without_torch(default_model_path: Path) -> None:
    """The engine process has it; in the service it would cost memory and seconds at every start."""
    program = (
        "import sys; from pathlib import Path; import service.__main__; "
        "from service.text.tokenizer import Tokenizer; Tokenizer(Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, default_model_path], cwd=ROOT, check=True)


def test_only_the_settings_read_the_environment() -> None:
    def reads(path: Path) -> bool:
        attributes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))
        return any(node.attr in ("environ", "getenv", "putenv") for node in attributes)

    rooms = [room for room in ROOMS if room != "loadtests"]  # a client is a program of its own
    assert {name_of(path) for path in sources(*rooms) if reads(path)} <= ENVIRONMENT_READERS


def test_only_the_engine_step_swallows_every_exception() -> None:
    """A handler that undoes something and raises again swallows nothing."""

    def swallows(handler: ast.ExceptHandler) -> bool:
        caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        everything = any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in caught)
        return everything and ast.unparse(handler.body[-1]) != "raise"

    found = [
        (name_of(path), ast.unparse(node.body[-1]))
        for path in sources(*ROOMS)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler) and swallows(node)
    ]
    assert [name for name, _ in found] == ["runtime/process.py"], found


def test_no_file_is_too_long_to_be_read_in_one_go() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in sources(*ROOMS, "tests")}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_tests_are_no_package() -> None:
    assert [name_of(path) for path in (ROOT / "tests").rglob("__init__.py")] == []
