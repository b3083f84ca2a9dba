"""Whom the root names when a worker says that it cannot go on."""

import pytest

from pyllama_dist.errors import NodeError
from pyllama_dist.net.messages import Error, Message, Phase, Ready
from pyllama_dist.workers import Workers


class OneMessage:
    """A channel on which one message waits."""

    address = "10.0.0.2:9999"

    def __init__(self, message: Message) -> None:
        self.message = message

    def receive(self, timeout: float | None) -> tuple[Message, bytes]:
        return self.message, b""


def refusal(session: Phase, message: Error) -> str:
    """What the root says of it."""
    workers = Workers()
    workers.begin(session, 1.0)
    with pytest.raises(NodeError) as refused:
        workers.expect(OneMessage(message), Ready)
    return str(refused.value)


@pytest.mark.parametrize("phase", [Phase.HELLO, Phase.NET, Phase.STEP])
def test_a_worker_is_believed(phase):
    said = refusal(phase, Error(phase, "no memory"))
    assert said == f"worker 10.0.0.2:9999 in phase {phase}: no memory"


def test_a_worker_that_knows_the_root_no_longer_has_lost_its_connection():
    # ZeroMQ connects again by itself; what comes then is for the worker the message of a stranger.
    said = refusal(Phase.WEIGHTS, Error(Phase.HELLO, "WeightsEnd before hello"))
    assert said.startswith("lost the link the root - 10.0.0.2:9999 in phase WEIGHTS: ")
    assert "before hello" not in said
