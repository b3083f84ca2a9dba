"""Runs `checker.py`, and starts it again after a grammar that was too much for it."""

import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Lock

from pyllama_dist.closing import Closing
from pyllama_dist.errors import SystemLimitError, UsageError
from pyllama_dist.text.grammar import checker

_TIME_SIGNALS = (signal.SIGPROF, signal.SIGALRM)


class CheckerProcess(Closing):
    """Checks grammars one after the other.

    The process ends when this is closed, and with the process that started it.
    """

    def __init__(self, vocab_size: int) -> None:
        """Starts nothing before the first check."""
        self._vocab_size = vocab_size
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, source: str) -> str:
        """The library's complaint about a grammar of Unicode text; empty if there is none.

        Raises:
            UsageError: the grammar takes too much time or memory.
            SystemLimitError: the process does not run.
        """
        with self._lock:
            process = self._process or self._start()
            if process.stdin is None or process.stdout is None:
                raise RuntimeError("both are pipes")
            said = None
            with suppress(BrokenPipeError):
                checker.write_frame(process.stdin, source)
                said = checker.read_frame(process.stdout)
            if said is not None:
                return said
            self._process = None
            process.communicate()
            code = process.returncode
        if code >= 0:
            raise SystemLimitError(
                f"the process that checks grammars ended with code {code}; "
                "install pyllama-dist[grammar] again"
            )
        what = "time" if -code in _TIME_SIGNALS else "memory"
        raise UsageError(
            f"the grammar takes too much {what}; simplify the schema: shorter patterns, fewer "
            "properties"
        )

    def close(self, error: BaseException | None = None) -> None:
        """Ends the process."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.communicate()
                self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        program = str(Path(checker.__file__))
        self._process = subprocess.Popen(
            [sys.executable, "-P", program, str(self._vocab_size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # panics of the library, which it also returns
            start_new_session=True,  # ^C is for the one who started us
        )
        return self._process
