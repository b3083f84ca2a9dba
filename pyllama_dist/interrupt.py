"""^C that does not get lost.

Python raises `KeyboardInterrupt` wherever it is when a signal comes. If that is in a destructor,
the exception is printed and dropped: pyzmq looks for signals whenever it frees a received frame
(`Frame.__dealloc__`). So who waits asks again here.
"""

import ctypes
import os
import signal
import sys
import threading
from types import FrameType

_SOON = 0.05  # seconds
_interrupted = False


def install() -> None:
    """From now on SIGINT and SIGTERM interrupt this process, even if the exception is dropped."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)


def repeat_dropped() -> None:
    """From now on an interrupt that Python drops, in a destructor or a callback, comes again."""
    others = sys.unraisablehook

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            # Not yet: it would be dropped in this hook as well.
            again = threading.Timer(_SOON, os.kill, (os.getpid(), signal.SIGINT))
            again.daemon = True
            again.start()
        else:
            others(dropped)

    sys.unraisablehook = hook


def thread(one: threading.Thread) -> None:
    """Interrupts a thread as soon as it runs Python code, if it is still there."""
    if one.is_alive():
        ident = ctypes.c_ulong(one.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(KeyboardInterrupt))


def check() -> None:
    """Raises again what a signal has raised.

    Raises:
        KeyboardInterrupt: a signal came since `install`.
    """
    if _interrupted:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt
