"""Downloads under fault, by the command line and a real daemon: nothing is lost, and nothing half-written is ever loaded."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from llm_daemon.daemon.address import reserve
from llm_daemon.testing.world import LLM_DAEMON, World

SIZE = 3_000_000  # bytes of weights
# Serves one file with ranges, and prints a line for each request.  Stops in the middle of an answer, as often as it is
# told, until a line comes on its standard input.
SERVER = """
import http.server, sys, threading
path, host, port, stops = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4])
data, go = open(path, "rb").read(), threading.Event()
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def do_HEAD(self): self.do_GET()
    def do_GET(self):
        global stops
        asked = self.headers["Range"]
        start = int(asked[6:-1]) if asked else 0
        body = data[start:]
        self.send_response(206 if asked else 200)
        self.send_header("ETag", '"one"')
        self.send_header("Content-Length", str(len(body)))
        if asked: self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD": return
        print("GET", start, flush=True)
        if stops:
            stops -= 1
            self.wfile.write(body[:1_000_000])
            self.wfile.flush()
            print("stopped", flush=True)
            go.wait()
            body = body[1_000_000:]
        try: self.wfile.write(body)
        except OSError: pass
class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    def handle_error(self, *args): pass
server = Server((host, port), Handler)
print(server.server_address[1], flush=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
while sys.stdin.readline(): go.set()
"""


class Web:
    """The server, a process of its own: it can be killed."""

    def __init__(self, world: World, file: Path, place: tuple[str, int] | None = None, stops: int = 0) -> None:
        if place is None:
            with reserve() as sock:  # on an address of its own, where nobody takes its port while it is dead
                place = sock.getsockname()
        argv = [sys.executable, "-c", SERVER, str(file), *map(str, place), str(stops)]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        world.children.append(self.process)  # ended with it, if not before
        self.place = place
        assert self.line() == str(place[1])
        self.url = "http://{}:{}/model.gguf".format(*place)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> list[str]:
        """SIGKILL; the lines it printed that nobody read."""
        self.process.send_signal(signal.SIGKILL)
        said = self.process.communicate()[0]
        return [line for line in said.splitlines() if line]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model that no engine could run, but whole: what is tested ends before that."""
    path = tmp_path / "served.gguf"
    out = gguf.GGUFWriter(path, "llama")
    out.add_tensor("t.weight", np.frombuffer(random.Random(3).randbytes(SIZE), dtype=np.int8))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture
def pulls(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[str]]]:
    """`models pull` processes that a test began; and a cache of its own."""
    monkeypatch.setenv("LLM_DAEMON_CACHE_DIR", str(world.base / "cache"))
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    begun: list[subprocess.Popen[str]] = []
    yield begun
    for process in begun:
        process.kill()
        process.communicate()


def pull(begun: list[subprocess.Popen[str]], url: str) -> subprocess.Popen[str]:
    argv = [LLM_DAEMON, "models", "pull", url, "--json", "--quiet"]
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    begun.append(process)
    return process


def on_disk(world: World) -> list[Path]:
    """What would be taken for a whole model."""
    return sorted((world.base / "cache").glob("models/*/*.gguf"))


def assert_nothing_there(world: World, url: str) -> None:
    assert on_disk(world) == []
    shown = world.llm_daemon("models", "show", url)
    assert shown.returncode == 0 and "fetched when it is first used" in shown.stdout
    assert json.loads(world.llm_daemon("models", "list", "--json").stdout)["others"] == []


def assert_pulled(world: World, begun: list[subprocess.Popen[str]], url: str, model: Path) -> None:
    out, err = pull(begun, url).communicate(timeout=60)
    assert err == ""
    assert Path(json.loads(out)["path"]).read_bytes() == model.read_bytes()
    assert len(on_disk(world)) == 1


def test_a_server_that_is_killed_midway(world: World, pulls: list[subprocess.Popen[str]], model: Path) -> None:
    web = Web(world, model, stops=1)
    process = pull(pulls, web.url)
    assert (web.line(), web.line()) == ("GET 0", "stopped")
    web.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "again" in err
    assert_nothing_there(world, web.url)
    again = Web(world, model, web.place)
    try:
        assert_pulled(world, pulls, again.url, model)
        (asked,) = [line for line in again.kill() if line.startswith("GET")]
        assert 0 < int(asked.split()[1]) <= 1_000_000  # it goes on where it broke off
    finally:
        again.process.kill()


def test_a_load_of_what_breaks_off_loads_nothing(world: World, pulls: list[subprocess.Popen[str]], model: Path) -> None:
    web = Web(world, model, stops=1)
    load = subprocess.Popen(
        [LLM_DAEMON, "load", web.url, "--quiet"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=dict(os.environ),
    )  # fmt: skip
    pulls.append(load)
    assert (web.line(), web.line()) == ("GET 0", "stopped")
    web.kill()
    out, err = load.communicate(timeout=60)
    assert (load.returncode, out) == (75, "") and len(err.strip().splitlines()) <= 2
    assert not (world.state / "logs").exists() or not list((world.state / "logs").glob("engine-*"))  # no engine was started
    assert_nothing_there(world, web.url)


def test_a_disk_that_is_full(world: World, pulls: list[subprocess.Popen[str]], model: Path) -> None:
    web = Web(world, model)
    try:
        limited = subprocess.run(  # a limit on the size of files looks like a full disk, and needs no disk of its own
            ["/bin/sh", "-c", f'ulimit -f {SIZE // 1024}; exec "$0" "$@"', LLM_DAEMON, "models", "pull", web.url, "--quiet"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert limited.returncode == 75 and "the disk is full" in limited.stderr and "hint" in limited.stderr
        assert_nothing_there(world, web.url)
        assert world.llm_daemon("stop", "--force").returncode == 0  # that daemon has the limit too
        assert_pulled(world, pulls, web.url, model)
    finally:
        web.kill()


def test_a_file_that_is_corrupt_on_its_way_or_on_disk(
    world: World, pulls: list[subprocess.Popen[str]], model: Path, tmp_path: Path
) -> None:
    whole = model.read_bytes()
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    pin = f"#sha256={hashlib.sha256(whole).hexdigest()}"
    web = Web(world, wrong)
    done = world.llm_daemon("models", "pull", web.url + pin, "--quiet")
    assert done.returncode == 2 and "is not the file with sha256" in done.stderr
    assert_nothing_there(world, web.url + pin)
    web.kill()
    web = Web(world, model, web.place)
    try:
        assert_pulled(world, pulls, web.url + pin, model)
        os.truncate(on_disk(world)[0], SIZE // 2)
        shown = world.llm_daemon("models", "show", web.url + pin)
        assert "fetched when it is first used" in shown.stdout
        assert_pulled(world, pulls, web.url + pin, model)
    finally:
        web.kill()


def test_two_downloads_of_one_file_are_one(world: World, pulls: list[subprocess.Popen[str]], model: Path) -> None:
    web = Web(world, model, stops=1)
    try:
        first = pull(pulls, web.url)
        assert (web.line(), web.line()) == ("GET 0", "stopped")
        shown = subprocess.Popen(  # with progress, to see that it waits
            [LLM_DAEMON, "models", "pull", web.url], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=dict(os.environ),
        )  # fmt: skip
        pulls.append(shown)
        assert shown.stderr is not None
        while "another process is downloading" not in (line := shown.stderr.readline()):
            assert line, "it never waited"
        web.go_on()
        for process in (first, shown):
            process.communicate(timeout=60)
            assert process.returncode == 0
        assert [path.read_bytes() == model.read_bytes() for path in on_disk(world)] == [True]
        assert web.kill() == []  # nobody else has asked
    finally:
        web.process.kill()
