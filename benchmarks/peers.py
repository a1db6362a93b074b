"""The relays that ours is measured against: nginx, one on aiohttp as anybody would write it, and the least one (floor.py).

python peers.py SOCKET    the aiohttp relay to an engine at a unix socket; says its port, ends when its stdin does
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

FLOOR = str(Path(__file__).with_name("floor.py"))
FOR_EVER = 3600.0  # seconds an idle connection is kept


@dataclass(frozen=True, slots=True)
class Peer:
    """A running relay on loopback."""

    port: int
    pid: int


NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr crit;
events {{ worker_connections 16384; }}
http {{
  access_log off; keepalive_requests 10000000; keepalive_timeout 3600s;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u;
  scgi_temp_path {folder}/s;
  upstream engine {{ server unix:{path}; keepalive 256; keepalive_requests 10000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_request_buffering on;
    }}
  }}
}}
"""


def nginx_program() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


@contextmanager
def nginx(folder: Path, path: str) -> Iterator[Peer | None]:
    """Runs nginx, unbuffered and kept alive, in front of the engine at `path`; None where it is not installed."""
    program = nginx_program()
    if program is None:
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, path=path, port=port))
    with subprocess.Popen([program, "-p", str(folder), "-e", "stderr", "-c", str(config)]) as process:
        try:
            deadline = time.monotonic() + 5
            while process.poll() is None and time.monotonic() < deadline:
                with suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                time.sleep(0.01)  # nginx has no way to say that it listens
            yield Peer(port, process.pid)
        finally:
            process.terminate()
            process.wait(10)


@contextmanager
def python_relay(script: str, path: str) -> Iterator[Peer | None]:
    """Runs this file or floor.py in front of the engine at `path`; None where something it needs is not installed."""
    argv = [sys.executable, script, path]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            line = process.stdout.readline().strip()
            if not line:
                raise RuntimeError(f"{script} did not start")
            yield Peer(int(line), process.pid) if line != "missing" else None
        finally:
            process.stdin.close()
            process.wait(10)


async def serve(path: str) -> None:
    from aiohttp import ClientSession, ClientTimeout, UnixConnector, web

    async def relay(request: web.Request) -> web.StreamResponse:
        headers = {name: request.headers[name] for name in ("Content-Type", "Accept", "User-Agent") if name in request.headers}
        body = await request.read()
        async with session.request(request.method, f"http://engine{request.path_qs}", headers=headers, data=body) as answer:
            out = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.headers.get("Content-Type", "")})
            out.content_length = answer.content_length
            await out.prepare(request)
            async for piece in answer.content.iter_any():
                await out.write(piece)
            await out.write_eof()
            return out

    connector = UnixConnector(path, limit=0, keepalive_timeout=FOR_EVER)
    async with ClientSession(connector=connector, timeout=ClientTimeout(total=None)) as session:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", relay)
        runner = web.AppRunner(app, access_log=None, keepalive_timeout=FOR_EVER)
        await runner.setup()
        sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
        await web.SockSite(runner, sock, backlog=1024).start()
        print(sock.getsockname()[1], flush=True)
        over = asyncio.Event()
        asyncio.get_running_loop().add_reader(0, over.set)
        await over.wait()
        await runner.cleanup()


if __name__ == "__main__":
    try:
        import aiohttp  # noqa: F401
        import uvloop
    except ImportError:
        print("missing", flush=True)
        sys.exit(0)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop_runner:
        loop_runner.run(serve(sys.argv[1]))
