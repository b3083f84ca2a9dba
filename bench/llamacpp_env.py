"""Builds llama.cpp for this machine, in an environment of its own.

It is the package llama-cpp-python of PyPI, compiled here, because the wheels that others have
compiled leave out instructions that this CPU may have. That takes ten minutes on two cores.
"""

import json
import os
import re
import subprocess
import venv
from dataclasses import asdict, dataclass
from pathlib import Path

from pyllama_dist.errors import UsageError

VERSION = "0.3.36"
# gcc 12 drops stores to the configuration of AMX tiles as dead ones: the first prompt would crash.
_CMAKE_ARGS = (
    "-DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release -DLLAVA_BUILD=OFF "
    '-DCMAKE_CXX_FLAGS="-fno-tree-dse -fno-dse"'
)
_COMPILER = re.compile(r"The CXX compiler identification is (.+)")


@dataclass(frozen=True)
class Build:
    """How llama.cpp was built."""

    version: str  # of llama-cpp-python
    cmake_args: str
    compiler: str


def python(env: Path) -> Path:
    """The interpreter of an environment."""
    return env / "bin" / "python"


def prepare(env: Path) -> Build:
    """Makes the environment unless it is there.

    CMAKE_ARGS, CC and CXX of this process are heeded.

    Args:
        env: directory of the environment; a build that was not finished is done again.

    Returns:
        How the llama.cpp in it was built.

    Raises:
        UsageError: it cannot be built; a compiler or the network may be missing.
    """
    record = env / "build.json"
    if not record.exists():
        record.write_text(json.dumps(asdict(_build(env))))
    return Build(**json.loads(record.read_text()))


def _build(env: Path) -> Build:
    venv.create(env, clear=True, with_pip=True)
    cmake_args = os.environ.get("CMAKE_ARGS", _CMAKE_ARGS)
    # Without the cache, in which pip may have a wheel that was built with other arguments.
    command: list[str | Path] = [python(env), "-m", "pip", "install", "--verbose", "--no-cache-dir"]
    command += ["--no-binary", "llama-cpp-python", f"llama-cpp-python=={VERSION}", "gguf"]
    log = env / "build.log"
    with log.open("w") as output:
        status = subprocess.run(
            command,
            env={**os.environ, "CMAKE_ARGS": cmake_args},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        ).returncode
    if status:
        raise UsageError(f"llama-cpp-python {VERSION} was not built: see the end of {log}")
    compiler = _COMPILER.search(log.read_text(errors="replace"))
    return Build(VERSION, cmake_args, compiler[1] if compiler else "unknown")
