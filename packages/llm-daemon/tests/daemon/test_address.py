"""TCP addresses: a reserved port is nobody else's, and who listens there is known."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llm_daemon.daemon.address import holds, listeners, reserve

LISTEN = """
import socket, sys
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
for option in sys.argv[3:]:
    s.setsockopt(socket.SOL_SOCKET, getattr(socket, option), 1)
try:
    s.bind((sys.argv[1], int(sys.argv[2])))
    s.listen()
except OSError as e:
    print(e.strerror, flush=True)
else:
    print("listens at", s.getsockname()[1], flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def listener(host: str, port: int, *options: str, wrap: tuple[str, ...] = ()) -> Iterator[tuple[int, str]]:
    """Another process that tries to listen: its pid, and what it says; its port too, if it was to choose one."""
    argv = [*wrap, sys.executable, "-I", "-S", "-c", LISTEN, host, str(port), *options]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline().strip()
        yield process.pid, said.partition(" at ")[0] if port else said


@pytest.mark.parametrize("options", [["SO_REUSEADDR"], ["SO_REUSEPORT"], ["SO_REUSEADDR", "SO_REUSEPORT"]])
def test_an_engine_listens_beside_the_reservation(options: list[str]) -> None:
    with reserve() as reserved:
        host, port = reserved.getsockname()
        assert listeners(host, port) == {}
        with listener(host, port, *options) as (pid, said):
            assert said == "listens"
            [inode] = listeners(host, port)
            assert holds(pid, {inode}) == {inode}
            assert holds(os.getpid(), {inode}) == {inode}  # the tree below us has it
            with socket.create_connection((host, port)) as connection:
                assert connection.getpeername() == (host, port)
            with listener(host, port, "SO_REUSEADDR") as (_, second):
                assert second == "Address already in use"


def test_nobody_else_can_have_a_reserved_port() -> None:
    with reserve() as reserved:
        with listener(*reserved.getsockname()) as (_, said):
            assert said == "Address already in use"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(reserved.getsockname())


def test_reserved_ports_are_on_hosts_of_their_own() -> None:
    with reserve() as one, reserve() as two:
        assert one.getsockname() != two.getsockname()
        assert one.getsockname()[0].startswith("127.")


def test_a_child_of_a_wrapper_holds_it() -> None:
    with (
        reserve() as reserved,
        listener(*reserved.getsockname(), "SO_REUSEADDR", wrap=("/bin/sh", "-c", '"$@"; true', "sh")) as (pid, said),
    ):
        assert said == "listens"
        found = set(listeners(*reserved.getsockname()))
        assert holds(pid, found) == found
        assert holds(pid, {1}) == set()


@pytest.mark.parametrize(
    ("host", "everywhere"), [("0.0.0.0", True), ("::", True), ("::ffff:127.0.0.1", False), ("127.0.0.1", False)]
)
def test_whether_it_listens_on_every_interface(host: str, everywhere: bool) -> None:
    with listener(host, 0) as (_, said):
        assert said.startswith("listens at ")
        port = int(said.split()[-1])
        assert list(listeners("127.0.0.1", port).values()) == [everywhere]
        assert bool(listeners("127.1.2.3", port)) == everywhere
