"""How kernels are compiled and where the compiled code is kept.

Numba notices a changed file only for the function it holds, not for what that function calls: a
cached op loop would go on with old kernels. So the cache directory is named after a hash of this
package's sources, of the versions and the CPU that the code was made for, and of the kernels that
are chosen. Cache files are pickles: the directory belongs to the user alone.
"""

import hashlib
import os
import platform
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import config as numba_config
from platformdirs import user_cache_path

from pyllama_kernels.cpu import KernelsError, choose, host


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    here = host()
    try:
        kernels = choose().name
    except KernelsError:
        kernels = ""  # nothing will be run; loading them raises the reason
    target = (here.machine, here.target, here.flags, kernels, platform.python_version())
    digest.update(repr((numba.__version__, llvmlite.__version__, target)).encode())
    return digest.hexdigest()[:16]


def cache_directory() -> Path | None:
    """The directory of compiled kernels, made if need be; None where no private one can be had."""
    base = os.environ.get("PYLLAMA_DIST_CACHE_DIR")
    try:
        folder = Path(base) if base else user_cache_path("pyllama-dist")
    except RuntimeError:  # a user without a home directory
        return None
    folder /= f"kernels-{_fingerprint()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine = folder.stat()
    except OSError:
        return None
    others_write = mine.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return None if mine.st_uid != os.getuid() or others_write else folder


CACHE = cache_directory()


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function without the interpreter lock, and keeps the code in `CACHE`.

    Floating-point sums may be reordered into vector lanes, the same way at every call: results do
    not depend on the number of threads.
    """
    return _compiled(function, fastmath={"nsz", "arcp", "contract", "reassoc"})


def exact_kernel(function: Callable[..., Any]) -> Any:
    """As `kernel`, but every floating-point operation is rounded as it is written."""
    return _compiled(function, fastmath=False)


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    options |= {"nogil": True, "error_model": "numpy"}
    if CACHE is None:
        return numba.njit(**options)(function)
    # Numba reads this setting at decoration; no other library's functions are to land there.
    before, numba_config.CACHE_DIR = numba_config.CACHE_DIR, str(CACHE)
    try:
        return numba.njit(cache=True, **options)(function)
    finally:
        numba_config.CACHE_DIR = before
