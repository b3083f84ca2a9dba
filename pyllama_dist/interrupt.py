"""^C that does not get lost.

Python raises `KeyboardInterrupt` wherever it is when a signal comes. In a destructor or a callback
the exception is printed and dropped: pyzmq looks for signals whenever it frees a received frame
(`Frame.__dealloc__`), and imports free their locks in callbacks.
"""

import ctypes
import os
import signal
import sys
import threading

_SOON = 0.05  # seconds
_SIGNALS = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}  # what they raise


def repeat_dropped() -> None:
    """From now on a signal whose exception is dropped comes again."""
    others = sys.unraisablehook

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        number = _SIGNALS.get(dropped.exc_type)
        if number is None:
            others(dropped)
            return
        # Not yet: it would be dropped in this hook as well.
        again = threading.Timer(_SOON, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook


def thread(one: threading.Thread) -> None:
    """Interrupts a thread as soon as it runs Python code, if it is still there."""
    if one.is_alive():
        ident = ctypes.c_ulong(one.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(KeyboardInterrupt))
