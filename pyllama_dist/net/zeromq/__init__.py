"""The transport between machines: ZeroMQ. See `PROTOCOL.md` for sockets and options."""

from pyllama_dist.net.zeromq.dialer import ZmqDialer
from pyllama_dist.net.zeromq.listener import ZmqListener

__all__ = ["ZmqDialer", "ZmqListener"]
