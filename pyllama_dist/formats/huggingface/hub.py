"""Fetches checkpoints from Hugging Face into the cache that all its libraries share.

`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean here what they mean to the library.
"""

import errno
import glob
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllama_dist.errors import FileError, PyllamaError, UsageError
from pyllama_dist.files import one_line, read_json

Progress = Callable[[int, int], None]

_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TEXTS = (
    _CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    _INDEX,
)
_REPO_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Fetched:
    """What lies in the cache now.

    Attributes:
        path: the directory of a checkpoint, or the one file that was asked for.
        revision: what was asked for: a branch, a tag or a commit.
        commit: that it stands for.
        files: names in the repository.
        size: bytes of these files.
    """

    path: Path
    revision: str
    commit: str
    files: tuple[str, ...]
    size: int


def is_repo_name(text: str) -> bool:
    """Whether a text looks like the name of a repository.

    >>> [is_repo_name(text) for text in ("zai-org/GLM-4-9B-0414", "./GLM", "/a/b", "a/b/c")]
    [True, False, False, False]
    """
    return _REPO_NAME.fullmatch(text) is not None


def fetch_checkpoint(repo: str, revision: str, progress: Progress) -> Fetched:
    """Fetches the files of a checkpoint that a conversion needs, and no others.

    Files that are in the cache are not fetched again, so a call after one that broke off goes on
    with the files that are missing. A connection that breaks is taken up where it broke.

    Args:
        repo: `owner/name`.
        revision: a branch, a tag or a commit.
        progress: is told the bytes of the tensors fetched so far, and those to fetch.

    Raises:
        UsageError: no such repository or revision, or no right to read it.
        FileError: it is no checkpoint in safetensors format, or it could not be fetched.
    """
    _check_name(repo)
    with _in_words(repo, revision):
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(repo, revision=revision, allow_patterns=list(_TEXTS)))
    if not (path / _CONFIG).exists():
        raise FileError(
            f"{repo}: no {_CONFIG} is there, so it is no checkpoint; give another repository, "
            f"or one file of it with `fetch --file`"
        )
    commit = path.name
    tensors = _shards(path / _INDEX) if (path / _INDEX).exists() else [_SINGLE]
    sizes = _sizes(repo, commit)
    lacking = [name for name in tensors if not (path / name).exists()]
    if sizes and _SINGLE in lacking and _SINGLE not in sizes:
        raise FileError(
            f"{repo}: neither {_SINGLE} nor {_INDEX} is there; give a repository in safetensors "
            f"format"
        )
    to_fetch = sum(sizes.get(name, 0) for name in lacking)
    if (free := shutil.disk_usage(path).free) < to_fetch:
        raise FileError(
            f"{path}: {free >> 20} MiB free, {repo} takes {to_fetch >> 20} MiB more; free some "
            f"space, or set HF_HOME to a directory on another disk"
        )
    with _in_words(repo, revision):
        snapshot_download(
            repo,
            revision=commit,
            allow_patterns=[glob.escape(name) for name in tensors],
            tqdm_class=_bar(progress, to_fetch),
        )
    for name in tensors:
        if not (path / name).exists():
            raise FileError(f"{repo}: {name} is missing there; give a complete repository")
    files = [name for name in (*_TEXTS, *tensors) if (path / name).exists()]
    size = sum((path / name).stat().st_size for name in files)
    return Fetched(path, revision, commit, tuple(files), size)


def fetch_file(repo: str, name: str, revision: str, progress: Progress) -> Fetched:
    """Fetches one file of a repository, such as one in GGUF.

    Args:
        repo: `owner/name`.
        name: of the file in the repository, with its folders.
        revision: a branch, a tag or a commit.
        progress: is told the bytes fetched so far, and those to fetch.

    Raises:
        UsageError: no such repository, revision or file, or no right to read it.
        FileError: it could not be fetched.
    """
    _check_name(repo)
    with _in_words(repo, revision, name):
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(repo, name, revision=revision, tqdm_class=_bar(progress, None)))
    commit = path.parents[name.count("/")].name  # .../snapshots/COMMIT/NAME
    return Fetched(path, revision, commit, (name,), path.stat().st_size)


def _check_name(repo: str) -> None:
    if not is_repo_name(repo):
        raise UsageError(f"{repo!r} is no name of a repository; give OWNER/NAME")


def _shards(index: Path) -> list[str]:
    """Names of the files that the index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{index}: no object named weight_map; give a complete repository")
    names = []
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise FileError(f"{index}: {name!r} is no name of a file; give another repository")
        names.append(name)
    return sorted(set(names))


def _sizes(repo: str, commit: str) -> Mapping[str, int]:
    """Bytes of each file of a repository; none if only its files are in the cache."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path: file.size for file in get_cached_repo_tree(repo, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return {}


def _bar(progress: Progress, total: int | None) -> Any:
    """The class of bar that the library makes; it shows nothing and tells `progress` all bytes.

    Args:
        progress: is told bytes so far and bytes in all.
        total: bytes in all; if None, as the library says.
    """
    from huggingface_hub.utils.tqdm import tqdm

    lock = threading.Lock()  # files are fetched in several threads
    done = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # The library has bars for files and for the same bytes on their way, too.
            name = kwargs.get("name") or ""
            self._counts = kwargs.get("unit") == "B" and not name.endswith(".transfer")
            super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            if self._counts and n:
                with lock:
                    done += int(n)
                    progress(done, total or int(self.total or done))

    return Bar


@contextmanager
def _in_words(repo: str, revision: str, file: str | None = None) -> Iterator[None]:
    """Says what went wrong in the library."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise UsageError(
            f"{repo}: fetching it takes the huggingface_hub library; "
            f"install it with `pip install pyllama-dist[hub]`"
        ) from None
    try:
        yield
    # The libraries below, for HTTP and for chunks, have exceptions of their own.
    except Exception as error:
        raise _translate(error, repo, revision, file) from error


def _translate(error: BaseException, repo: str, revision: str, file: str | None) -> PyllamaError:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{repo!r} is no name of a repository; give OWNER/NAME")
    if isinstance(error, errors.GatedRepoError):
        return UsageError(
            f"{repo} at {constants.ENDPOINT} is gated; accept its terms on its page there, and set "
            f"HF_TOKEN to a token of your account"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(
            f"{repo}: no such repository at {constants.ENDPOINT}, or a private one; check the "
            f"name, or set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{repo} has no revision {revision!r}; give a branch, a tag or a commit")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return UsageError(f"{repo} has no file {file!r} at revision {revision!r}; check its name")
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, repo, constants.ENDPOINT)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return FileError(
            f"{repo}: not all of it is in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; "
            f"unset it, or fetch while online"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):  # nor did the network help
        if error.__cause__ is not None:
            return _translate(error.__cause__, repo, revision, file)
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return FileError(
            f"{constants.HF_HUB_CACHE}: the disk is full; free some space, or set HF_HOME to a "
            f"directory on another disk, and fetch again: complete files are kept"
        )
    elif isinstance(error, OSError) and error.filename:
        return FileError(
            f"{error.filename}: {error.strerror}; set HF_HOME to a directory that can be written"
        )
    return FileError(
        f"{repo} could not be fetched from {constants.ENDPOINT}: {one_line(error)}; check the "
        f"network and fetch again: complete files are kept"
    )


def _refused(error: Any, repo: str, endpoint: str) -> PyllamaError:
    """`error`: an HfHubHTTPError."""
    status = error.response.status_code
    if status in (401, 403):
        return UsageError(
            f"{repo}: {endpoint} refused access ({status}); set HF_TOKEN to a token that may "
            f"read it"
        )
    return FileError(f"{repo}: {endpoint} answered with HTTP status {status}; try again later")
