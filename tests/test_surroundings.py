"""Commands in processes of their own whose streams, files, names and limits are not as usual."""

import json
import os
import pwd
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pyllama_dist.cli.options import BUILTIN
from pyllama_dist.errors import SystemLimitError, refused_by_system
from pyllama_dist.formats.atomic_write import atomic_write
from pyllama_kernels import jit
from tests.tiers import slow_but

pytestmark = pytest.mark.timeout(120)

CHECKPOINT = Path(__file__).parent / "golden" / "glm4_bias_bf16"
HELLO = ("root", "--prompt", "hello")
NO_TEXT = b"\xff"  # no UTF-8

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.fixture
def run(tmp_path):
    """Runs a command line in a shell with redirections: exit code, output, messages."""

    def start(*args, redirect="", limit=None, stdin=b"", **variables):
        command = shlex.join([sys.executable, "-m", "pyllama_dist"]).encode()
        words = [os.fsencode(str(arg)) if not isinstance(arg, bytes) else arg for arg in args]
        quoted = b" ".join(b"'%b'" % word for word in words)
        limits = f"ulimit {limit}; ".encode() if limit else b""
        line = b"%bexec %b %b %b" % (limits, command, quoted, redirect.encode())
        done = subprocess.run(
            [b"bash", b"-c", line],
            input=stdin,
            capture_output=True,
            cwd=tmp_path,
            env=os.environ | variables,
            timeout=100,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr.decode()

    return start


def only_line(err: str) -> str:
    """The one line that says what is wrong; notes may come before it."""
    lines = [line for line in err.splitlines() if "error" in line]
    assert "Traceback" not in err
    assert "internal error" not in err
    assert "Exception ignored" not in err
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def commands(tmp_path):
    return {
        "help": ("--help",),
        "tokenize": ("tokenize", "hello"),
        "inspect": ("inspect", BUILTIN),
        "doctor": ("doctor",),
        "convert": ("convert", CHECKPOINT, tmp_path / "out"),
        "logits": ("logits", "--tokens", "1,2", "--out", tmp_path / "logits.npy"),
        "root": HELLO,
        "json": (*HELLO, "--json"),
        "bench": ("bench", "-p", "2", "-n", "2", "-r", "1"),
    }


QUICK = ("tokenize",)
REST = ("inspect", "root", "help", "doctor", "convert", "logits", "json", "bench")
EACH = slow_but(QUICK, [*QUICK, *REST])


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("redirect", [">&-", pytest.param(">/dev/full", marks=needs_full)])
def test_results_that_cannot_be_written(run, tmp_path, name, redirect):
    code, _, err = run(*commands(tmp_path)[name], redirect=redirect)
    assert code == 1
    assert "standard output cannot be written" in only_line(err)


@pytest.mark.parametrize("name", EACH)
def test_messages_that_cannot_be_written_are_lost(run, tmp_path, name):
    redirect = "2>/dev/full" if Path("/dev/full").exists() else "2>&-"
    code, out, _ = run(*commands(tmp_path)[name], redirect=redirect)
    assert code == 0
    assert out


@pytest.mark.parametrize("name", EACH)
def test_all_streams_closed(run, tmp_path, name):
    code, out, err = run(*commands(tmp_path)[name], redirect="<&- >&- 2>&-")
    assert (code, out, err) == (1, b"", "")


@pytest.mark.parametrize("name", EACH)
def test_closed_input(run, tmp_path, name):
    code, out, err = run(*commands(tmp_path)[name], redirect="<&-")
    assert code == 0
    assert out
    assert "error" not in err


@pytest.mark.slow
def test_a_chat_with_closed_input_ends(run):
    code, out, err = run("root", redirect="<&-")
    assert (code, out) == (0, b"")
    assert "error" not in err


@pytest.mark.parametrize("name", slow_but(["inspect"], ["inspect", "root"]))
def test_who_reads_the_results_goes(run, tmp_path, name):
    args = (*commands(tmp_path)["inspect"], "--tensors") if name == "inspect" else HELLO
    code, _, err = run(*args, redirect="| head -c0; exit ${PIPESTATUS[0]}")
    assert code == 1
    assert "error" not in err.lower()


def test_without_arguments_there_is_help(run):
    code, out, err = run()
    assert (code, out) == (2, b"")
    assert err.startswith("Usage: ")
    assert "error" not in err


@pytest.mark.slow
def test_what_is_read_and_is_no_text(run):
    code, out, err = run("root", stdin=b"hello " + NO_TEXT + b"\n")
    assert code == 0
    assert out.strip()
    assert "error" not in err


@pytest.mark.slow
def test_text_of_the_command_line_that_is_no_text(run):
    _, expected, _ = run("tokenize", "hello \N{REPLACEMENT CHARACTER}", "--json")
    code, out, _ = run("tokenize", b"hello " + NO_TEXT, "--json")
    assert code == 0
    assert json.loads(out) == json.loads(expected)
    code, out, err = run("root", "--system", b"x" + NO_TEXT, "--prompt", b"hello " + NO_TEXT)
    assert code == 0, err


@pytest.mark.slow
def test_a_language_that_the_terminal_cannot_show(run):
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    code, out, err = run("doctor", **ascii_only)
    assert code == 0, err
    assert b"kernels" in out
    code, out, err = run("inspect", "no-\N{LATIN SMALL LETTER E WITH ACUTE}", **ascii_only)
    assert code == 3
    only_line(err)
    with_answer = "import sys, pyllama_dist.cli.streams as s; s.prepare_streams(); print('\\xe9!')"
    shown = subprocess.run(
        [sys.executable, "-c", with_answer],
        env=os.environ | ascii_only,
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert shown.stdout == b"?!\n"


def odd(directory: Path) -> Path:
    """A path whose last name is no UTF-8."""
    return directory / os.fsdecode(b"name" + NO_TEXT)


ODD_NAMES = [
    (("inspect",), 3),
    (("tokenize", "hi", "--model"), 3),
    ((*HELLO, "--model"), 3),
    ((*HELLO, "--tokenizer"), 3),
    ((*HELLO, "--workers"), 2),
    (("bench", "--shape"), 2),
    (("convert",), 2),
    (("worker", "--host"), 2),
    ((), 2),
]


@pytest.mark.parametrize(("args", "expected"), slow_but(ODD_NAMES[:1], ODD_NAMES))
def test_a_name_that_is_no_text_is_quoted(run, tmp_path, args, expected):
    code, _, err = run(*args, odd(tmp_path))
    assert code == expected
    only_line(err)


@pytest.mark.slow
def test_a_model_whose_name_is_no_text(run, tmp_path):
    shutil.copytree(BUILTIN, odd(tmp_path), ignore=shutil.ignore_patterns("training"))
    code, out, err = run("inspect", odd(tmp_path))
    assert code == 0, err
    assert b"glm4" in out
    code, out, err = run(*HELLO, "--model", odd(tmp_path), "--json")
    assert code == 0, err
    assert json.loads(out)["text"]
    code, _, err = run(
        "logits", "--tokens", "1", "--out", odd(tmp_path / "..") / "x", "--model", BUILTIN
    )
    assert code == 2
    only_line(err)


@pytest.mark.slow
@needs_full
def test_a_full_disk_under_logits(run, tmp_path):
    code, _, err = run("logits", "--tokens", "1,2", "--out", "/dev/full")
    assert code == 2
    assert "No space left on device" in only_line(err)
    assert not Path("/dev/full").is_file()  # a device is written, not replaced


@pytest.mark.slow
def test_logits_that_are_too_large_leave_no_file(run, tmp_path):
    out = tmp_path / "there" / "logits.npy"
    out.parent.mkdir()
    out.write_bytes(b"as before")
    limit = "-f 1"  # KiB of a file; the kernels' cache is complete
    run("logits", "--tokens", "1", "--out", tmp_path / "warm.npy")
    code, _, err = run("logits", "--tokens", "1,2", "--out", out, limit=limit)
    assert code == 2
    assert "File too large" in only_line(err)
    assert out.read_bytes() == b"as before"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.slow
def test_logits_to_a_pipe(run):
    code, out, _ = run("logits", "--tokens", "1,2", "--out", "/dev/stdout", redirect="| head -c 6")
    assert code == 0
    assert out == np.lib.format.MAGIC_PREFIX


def test_replacing_writes_devices_and_pipes(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with atomic_write(pipe) as file:
        file.write(b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert list(tmp_path.iterdir()) == [pipe]
    assert pipe.is_fifo()


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["-n 8", "-n 16", "-n 32"])
def test_few_descriptors(run, limit):
    code, out, err = run(*HELLO, "--local-workers", "2", limit=limit)
    assert code or limit != "-n 8"
    if code:
        assert out == b""
        assert "ulimit -n" in only_line(err)


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["-v 200000", "-v 500000"])
@pytest.mark.parametrize(
    "name", ["root", pytest.param("doctor", marks=pytest.mark.slow), "tokenize", "logits"]
)
def test_little_memory(run, tmp_path, name, limit):
    code, _, err = run(*commands(tmp_path)[name], limit=limit)
    if code:
        assert "memory" in only_line(err) or "ulimit -v" in only_line(err)
    else:
        assert "error" not in err


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "PYLLAMA_DIST_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert jit.cache_directory() is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (OSError(24, "Too many open files", "x.m"), "x.m: Too many open files; raise the limit"),
        (OSError(28, "No space left on device"), "No space left on device; free"),
        (ImportError("lib.so: failed to map segment"), "failed to map segment; raise `ulimit -v`"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
    ],
)
def test_what_the_system_refuses_is_told_with_advice(error, said):
    known = refused_by_system(error)
    assert isinstance(known, SystemLimitError)
    assert said in str(known)
    assert refused_by_system(KeyError("x")) is None
