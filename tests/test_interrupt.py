"""^C that does not get lost."""

import subprocess
import sys

import pytest

# A signal comes where Python drops what is raised; then the process waits.
SCRIPT = """
import signal, weakref
from pyllama_dist import interrupt
from pyllama_dist.cli import _terminate
from pyllama_dist.net.zeromq import sockets

signal.signal(signal.{name}, {handler})
interrupt.repeat_dropped()

class Frame:
    def __del__(self):
        {destructor}

frame = Frame()
callback = weakref.ref(frame, lambda _: {callback})
del frame
print("dropped", flush=True)
try:
    sockets.poll([], None)
except KeyboardInterrupt:
    print("interrupted")
"""
DEFAULT, NOTHING = "signal.default_int_handler", "None"


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", ["destructor", "callback"])
@pytest.mark.parametrize(
    ("name", "handler", "code", "said"),
    [
        ("SIGINT", DEFAULT, 0, "interrupted\n"),
        ("SIGTERM", DEFAULT, 0, "interrupted\n"),  # as workers have it
        ("SIGTERM", "_terminate", 143, ""),
    ],
)
def test_a_signal_whose_exception_is_dropped_comes_again(place, name, handler, code, said):
    places = {"destructor": NOTHING, "callback": NOTHING}
    places[place] = f"signal.raise_signal(signal.{name})"
    script = SCRIPT.format(name=name, handler=handler, **places)
    if name == "SIGTERM" and handler == DEFAULT:
        script = f"import signal\nsignal.signal(signal.SIGINT, {DEFAULT})\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (code, "dropped\n" + said)
    assert done.stderr == ""
