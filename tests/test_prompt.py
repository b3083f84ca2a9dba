"""A chat on a terminal: what is pasted, and what ^C does where nothing is computed."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

pytestmark = pytest.mark.timeout(60)

PROGRAM = """
import sys
from pyllama_dist.cli.prompt import messages
for text in messages():
    print("got", repr(text), flush=True)
print("end", flush=True)
"""


class Terminal:
    """A terminal on which a program runs."""

    def __init__(self, process: subprocess.Popen[bytes], fd: int) -> None:
        self.process, self._fd = process, fd
        self._shown = self._all = b""

    def paste(self, data: bytes) -> None:
        """As terminals do: marked if the program has asked for it, else as if typed."""
        asked = self._all.rfind(b"\x1b[?2004h") > self._all.rfind(b"\x1b[?2004l")
        self.type(b"\x1b[200~" + data + b"\x1b[201~" if asked else data)

    def type(self, data: bytes) -> None:
        os.write(self._fd, data)

    def interrupt(self) -> None:
        time.sleep(0.3)  # Python notices no signal between showing the prompt and waiting for keys
        self.process.send_signal(signal.SIGINT)

    def wait_for(self, pattern: bytes, seconds: float = 30) -> bytes:
        """What was shown up to the pattern; only what comes after it is looked at next."""
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self._shown)) is None:
            if not select.select([self._fd], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"{pattern!r} not in {self._shown!r}")
            try:
                data = os.read(self._fd, 4096)
            except OSError:  # the program has ended
                raise EOFError(f"{pattern!r} not in {self._shown!r}") from None
            self._shown += data
            self._all += data
        shown, self._shown = self._shown[: found.end()], self._shown[found.end() :]
        return shown


@contextmanager
def terminal(*command: str) -> Iterator[Terminal]:
    own, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm"},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(process, own)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        with suppress(OSError):
            os.close(own)


@pytest.fixture
def prompt() -> Iterator[Terminal]:
    with terminal("-c", PROGRAM) as opened:
        opened.wait_for(rb"> ")
        yield opened


def test_a_pasted_text_is_one_message(prompt: Terminal) -> None:
    prompt.paste(b"first\rsecond\n\nlast")
    prompt.type(b"!\r")
    shown = prompt.wait_for(rb"got '[^']*'")
    assert shown.count(b"got ") == 1
    assert shown.endswith(rb"got 'first\nsecond\n\nlast!'")


def test_interrupts_at_the_prompt(prompt: Terminal) -> None:
    for line in (b"", b"half a li"):
        prompt.type(line)
        prompt.interrupt()
        prompt.wait_for(rb"\^D or /exit leaves")
        prompt.wait_for(rb"> ")
        prompt.type(b"still here\r")
        prompt.wait_for(rb"got 'still here'")
        prompt.wait_for(rb"> ")
    prompt.type(b"\x04")
    prompt.wait_for(rb"end")
    assert prompt.process.wait(20) == 0


def test_two_interrupts_in_a_row_leave(prompt: Terminal) -> None:
    prompt.interrupt()
    prompt.wait_for(rb"\^D or /exit leaves")
    prompt.wait_for(rb"> ")
    prompt.interrupt()
    assert prompt.process.wait(20) != 0


@pytest.mark.slow
def test_a_chat_goes_on_after_an_interrupt() -> None:
    with terminal("-m", "pyllama_dist", "root", "--temperature", "0") as chat:
        chat.wait_for(rb"> ")
        chat.paste(b"What is\r2 + 2?")
        chat.type(b"\r")
        chat.wait_for(rb"4")
        chat.wait_for(rb"> ")
        chat.interrupt()
        chat.wait_for(rb"\^D or /exit leaves")
        chat.wait_for(rb"> ")
        chat.type(b"What is 3 + 3?\r")
        chat.wait_for(rb"6")
        chat.wait_for(rb"> ")
        chat.type(b"/exit\r")
        assert chat.process.wait(20) == 0
