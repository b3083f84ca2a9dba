"""^C that does not get lost."""

import subprocess
import sys

import pytest

# A weak reference's callback is where Python drops what is raised; imports use such callbacks.
SCRIPT = """
import signal, time, weakref
from pyllama_dist import interrupt

class Thing:
    pass

signal.signal(signal.SIGINT, signal.default_int_handler)
interrupt.repeat_dropped()
thing = Thing()
callback = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
try:
    del thing
    time.sleep(60)
    print("lost")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_an_interrupt_that_a_callback_drops_comes_again():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "interrupted\n"
    assert done.stderr == ""
