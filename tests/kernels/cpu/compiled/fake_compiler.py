"""A compiler for the tests of the build: it counts its calls, and copies a file instead of compiling."""

import shlex
from pathlib import Path

import pytest


class FakeCompiler:
    """A shell script, named by CXX; its cache is empty and no library was built in advance."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        directory.mkdir()
        self.path, self.cache = directory / "fake-c++", directory / "cache"
        self._calls, self._version, self._output = (directory / name for name in ("calls", "version", "output"))
        self.libraries = self.cache / "rootstock" / "kernels"
        self.set_version("fake 1.0")
        self.set_output("a library")
        self.behave()
        monkeypatch.setenv("CXX", str(self.path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.cache))
        monkeypatch.setattr("kernels.cpu.compiled.build.PREBUILT", directory / "none")

    def set_version(self, version: str) -> None:
        self._version.write_text(version)

    def set_output(self, content: str) -> None:
        self._output.write_text(content)

    def behave(self, then: str = "") -> None:
        """Run a line of shell before the output is written; $output is its path."""
        calls, version, output = (shlex.quote(str(path)) for path in (self._calls, self._version, self._output))
        self.path.write_text(
            f"""#!/bin/sh
PATH=/usr/bin:/bin
if [ "$1" = --version ]; then exec cat {version}; fi
echo "$@" >> {calls}
for output; do :; done
{then}
cp {output} "$output"
"""
        )
        self.path.chmod(0o755)

    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    def names(self) -> set[str]:
        """What lies in the cache, besides the lock."""
        return {path.name for path in self.libraries.iterdir()} - {"lock"}
