"""Ports that a test hands to a server which it starts later, or to none."""

import socket

_reserved: list[socket.socket] = []


def free_port() -> int:
    """A port of this machine that no other process is given until this one ends, and at which nothing listens yet.

    A server may listen there, because it allows the reuse of addresses as well; the kernel gives the port to nobody
    who asks for any.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    _reserved.append(reserved)
    return int(reserved.getsockname()[1])
