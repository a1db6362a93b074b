"""The gateway's port outlives a retired daemon's clients: the ghost lends it to its successor.

A ghost still has clients, and they know its port by heart.  So it offers the listening socket (SCM_RIGHTS, unix(7)) at
`g-NONCE/port-HOST-PORT` before it gives LIFE away, and stops accepting once a successor has taken it: the queue of
connections is one and the same, so nobody is refused in between.  The connection over which the socket went stays: for
the successor it is a lease, because the ghost's clients need the port; when it breaks, the ghost serves the port again.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

ANSWER_WAIT = 1.0  # seconds a successor waits for a ghost


def borrow(host: str, port: int | None) -> tuple[socket.socket, socket.socket] | None:
    """The listening socket of a ghost in the working folder that serves `host` at `port` (None: any), and the loan's connection.

    None if there is no such ghost.  Blocks for ANSWER_WAIT seconds for each ghost at most.
    """
    wanted = f"port-{host}-"
    for folder in sorted(name for name in os.listdir(".") if name.startswith("g-")):
        for name in _files(folder):
            if not name.startswith(wanted) or (port and name != f"{wanted}{port}"):
                continue
            loan = socket.socket(socket.AF_UNIX)
            try:
                loan.settimeout(ANSWER_WAIT)
                loan.connect(os.path.join(folder, name))
                _, fds, _, _ = socket.recv_fds(loan, 1, 1)
            except OSError:  # that ghost is dead
                fds = []
            if fds:
                return socket.socket(fileno=fds[0]), loan
            loan.close()
    return None


def _files(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


class Lender:
    """A ghost's side.  `lent` is called when a successor has the port, `returned` when it is gone again."""

    def __init__(self, tcp: socket.socket, folder: str, lent: Callable[[], None], returned: Callable[[], None]) -> None:
        host, port = tcp.getsockname()[:2]
        self.tcp, self._lent, self._returned = tcp, lent, returned
        self._loan: socket.socket | None = None
        self._loop = asyncio.get_running_loop()
        self._offer = socket.socket(socket.AF_UNIX)
        try:
            self._offer.bind(os.path.join(folder, f"port-{host}-{port}"))
            self._offer.listen(8)
            self._offer.setblocking(False)
        except OSError:
            self._offer.close()
            raise
        self._loop.add_reader(self._offer, self._lend)

    @property
    def is_lent(self) -> bool:
        return self._loan is not None

    def _lend(self) -> None:
        try:
            loan, _ = self._offer.accept()
        except OSError:
            return
        if self._loan is not None:  # one at a time
            loan.close()
            return
        try:
            socket.send_fds(loan, [b"p"], [self.tcp.fileno()])
        except OSError:
            loan.close()
            return
        self._loan = loan
        self._loop.add_reader(loan, self._over)
        self._lent()

    def _over(self) -> None:
        assert self._loan is not None
        self._loop.remove_reader(self._loan)
        self._loan.close()
        self._loan = None
        self._returned()
