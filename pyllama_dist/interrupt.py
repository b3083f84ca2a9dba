"""^C that does not get lost.

Python raises `KeyboardInterrupt` wherever it is when a signal comes. If that is in a destructor,
the exception is printed and dropped: pyzmq looks for signals whenever it frees a received frame
(`Frame.__dealloc__`). So who waits asks again here.
"""

import ctypes
import signal
import threading
from types import FrameType

_interrupted = False


def install() -> None:
    """From now on SIGINT and SIGTERM interrupt this process, even if the exception is dropped."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)


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
