"""Fetching, from a server on this machine that answers as Hugging Face does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "owner/tiny"


class Hub(ThreadingHTTPServer):
    """One repository; `break_at` cuts the first answer with a GGUF file after as many bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None, str | None]] = []
        self.break_at: int | None = None
        self.refusal: tuple[int, str] | None = None

    @property
    def got(self) -> list[str]:
        """Names of the files whose content was asked for."""
        marker = f"/resolve/{COMMIT}/"
        return [
            path.partition(marker)[2]
            for verb, path, *_ in self.requests
            if verb == "GET" and marker in path
        ]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        span = self.headers["Range"]
        hub.requests.append((self.command, path, span, self.headers["Authorization"]))
        if hub.refusal is not None:
            return self.answer(hub.refusal[0], b"{}", {"X-Error-Code": hub.refusal[1]})
        if path.startswith(f"/api/models/{REPO}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                for name, data in hub.files.items()
            ]
            return self.answer(200, json.dumps(tree).encode())
        if path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main"):
            return self.answer(200, json.dumps({"id": REPO, "sha": COMMIT}).encode())
        if path.startswith(f"/api/models/{REPO}/"):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name not in hub.files:
            code = "EntryNotFound" if path.startswith(f"/{REPO}/") else "RepoNotFound"
            return self.answer(404, b"{}", {"X-Error-Code": code})
        data = hub.files[name]
        facts = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT}
        if span is None:
            return self.answer(200, data, facts)
        start = int(span.removeprefix("bytes=").rstrip("-"))
        facts["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.answer(206, data[start:], facts)

    def answer(self, status: int, data: bytes, facts: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(facts or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.break_at is not None and ".gguf" in self.path:
            data, self.server.break_at = data[: self.server.break_at], None
        self.wfile.write(data)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    for file in (GOLDEN / "glm4_bias_bf16").iterdir():
        server.files[file.name] = file.read_bytes()
    server.files["pytorch_model.bin"] = server.files["original/a.safetensors"] = b"not wanted"
    server.files["consolidated.safetensors"] = b"the same again"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def call(hub: Hub, home: Path, *args: object, **env: str) -> tuple[int, str, str]:
    kept = {key: os.environ[key] for key in os.environ if not key.startswith("HF_")}
    env = (
        kept
        | {
            "HF_HOME": str(home),
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        | env
    )
    done = subprocess.run(
        [sys.executable, "-m", "pyllama_dist", *map(str, args)],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_only_what_is_needed_once(hub, tmp_path):
    code, out, err = call(hub, tmp_path, "fetch", REPO, "--json", HF_TOKEN="hf_secret")
    assert code == 0, err
    found = json.loads(out)
    assert found["commit"] == COMMIT
    assert sorted(hub.got) == found["files"] == ["config.json", "model.safetensors"]
    assert found["bytes"] == sum(len(hub.files[name]) for name in found["files"])
    path = Path(found["path"])
    assert path.is_relative_to(tmp_path)
    assert (path / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    sent = {(path, token) for _, path, _, token in hub.requests if REPO in path}
    assert {token for _, token in sent} == {"Bearer hf_secret"}, sent
    hub.requests.clear()
    code, out, err = call(hub, tmp_path, "fetch", REPO)
    assert (code, out) == (0, f"{path}\n"), err
    assert hub.got == []
    code, out, _ = call(hub, tmp_path, "fetch", REPO, HF_HUB_OFFLINE="1")
    assert (code, out) == (0, f"{path}\n")


def test_a_broken_connection_is_taken_up(hub, tmp_path):
    chunk = 10 << 20  # what the library writes at once
    hub.files["a.gguf"] = bytes(chunk) + b"the rest"
    hub.break_at = chunk + 2
    code, out, err = call(hub, tmp_path, "fetch", REPO, "--file", "a.gguf")
    assert code == 0, err
    assert f"bytes={chunk}-" in [span for _, _, span, _ in hub.requests]
    assert Path(out.strip()).read_bytes() == hub.files["a.gguf"]


def test_convert_fetches(hub, tmp_path):
    code, out, err = call(hub, tmp_path, "convert", REPO, tmp_path / "model")
    assert code == 0, err
    assert "model.m" in out


def test_one_file(hub, tmp_path):
    hub.files["q/tiny.gguf"] = b"GGUF"
    code, out, err = call(hub, tmp_path, "fetch", REPO, "--file", "q/tiny.gguf")
    assert code == 0, err
    assert Path(out.strip()).read_bytes() == b"GGUF"


@pytest.mark.parametrize(
    ("refusal", "args", "said"),
    [
        ((401, ""), [REPO], "refused access (401)"),
        ((404, "RepoNotFound"), [REPO], "no such repository"),
        ((401, "GatedRepo"), [REPO], "is gated"),
        ((403, ""), [REPO], "refused access (403)"),
        (None, [REPO, "--revision", "old"], "no revision 'old'"),
        (None, [REPO, "--file", "a.gguf"], "no file 'a.gguf'"),
        (None, ["a--b/c"], "no name of a repository"),
    ],
)
def test_refusals(hub, tmp_path, refusal, args, said):
    hub.refusal = refusal
    code, _, err = call(hub, tmp_path, "fetch", *args)
    assert code == 2, err
    assert said in err.splitlines()[-1]
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1


def test_no_safetensors(hub, tmp_path):
    del hub.files["model.safetensors"]
    code, _, err = call(hub, tmp_path, "fetch", REPO)
    assert code == 3
    assert "neither model.safetensors nor" in err


def test_offline(hub, tmp_path):
    code, _, err = call(hub, tmp_path, "fetch", REPO, HF_HUB_OFFLINE="1")
    assert code == 3
    assert "HF_HUB_OFFLINE is set" in err
