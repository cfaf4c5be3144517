"""Every public function of a Triton file has a twin in kernels.reference: the same file, name and parameters."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="needs triton")

import kernels
import kernels.reference

ROOT = Path(__file__).parents[2]
CONFIGURATION = {"config"}  # parameters that change how fast a kernel is, not the result: a twin has none of them


def modules_of(package: ModuleType) -> dict[str, ModuleType]:
    """The modules that lie in a package's folder, by file name."""
    names = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg]
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}


def public_functions(module: ModuleType) -> dict[str, Callable[..., object]]:
    """The functions that a module defines for others; kernels themselves are none."""
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def defines_kernels(module: ModuleType) -> bool:
    """Whether some function of a module is decorated with `triton.jit`."""
    functions = (node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.FunctionDef))
    return any("triton.jit" in ast.unparse(decorator) for node in functions for decorator in node.decorator_list)


TRITON = {name: module for name, module in modules_of(kernels).items() if defines_kernels(module)}
TWINS = modules_of(kernels.reference)


def signature(function: Callable[..., object]) -> tuple[list[inspect.Parameter], object]:
    """Parameters (names, order, defaults and types) and the type of the result, without the configuration."""
    found = inspect.signature(function)
    parameters = [each for each in found.parameters.values() if each.name not in CONFIGURATION]
    return parameters, found.return_annotation


def test_every_triton_file_has_a_twin_and_every_twin_a_triton_file() -> None:
    assert TRITON.keys() == TWINS.keys()


@pytest.mark.parametrize("name", TRITON)
def test_a_twin_has_the_public_functions_of_its_triton_file_with_the_same_parameters(name: str) -> None:
    ours, twins = public_functions(TRITON[name]), public_functions(TWINS[name])
    assert ours, f"{name} has no public function"
    assert ours.keys() == twins.keys()
    for function, launch in ours.items():
        assert signature(launch) == signature(twins[function]), f"{name}.{function}"
        assert not CONFIGURATION & inspect.signature(twins[function]).parameters.keys(), f"{name}.{function}"


def test_the_twins_the_cpu_path_and_what_the_host_prepares_need_no_triton() -> None:
    needed = [f"kernels.reference.{name}" for name in TWINS]
    needed += [f"kernels.cpu.{module.name}" for module in pkgutil.iter_modules([str(ROOT / "kernels" / "cpu")])]
    needed += ["kernels.lora_tiles", "kernels.offset_table", "kernels.row_params", "kernels.host_to_device"]
    program = f"import sys; sys.modules['triton'] = None; import {', '.join(needed)}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
