"""Other machines: over TLS and with a key of the user's own, or not at all."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from llm_daemon.config import Settings
from llm_daemon.core.routes import RELAYED
from llm_daemon.daemon import remote
from llm_daemon.errors import Unavailable, UsageError

from .fakes import FORM, TOKEN, Client, World

OPENSSL = shutil.which("openssl")
needs_openssl = pytest.mark.skipif(OPENSSL is None, reason="no openssl here")
KEY = "k3y-" + "x" * 28
ROUNDS = int(os.environ.get("ROUNDS", "300"))  # of troublesome handshakes


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a self-signed certificate, another's private key, and a token file."""
    folder = tmp_path_factory.mktemp("tls")
    assert OPENSSL is not None
    for name in ("", "other-"):
        subprocess.run(
            [
                OPENSSL, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                "-subj", "/CN=box.example", "-addext", "subjectAltName=DNS:box.example,IP:127.0.0.1",
                "-keyout", f"{name}key.pem", "-out", f"{name}cert.pem",
            ],
            cwd=folder, check=True, capture_output=True, stdin=subprocess.DEVNULL, env={**os.environ, "HOME": str(folder)},
        )  # fmt: skip
        (folder / f"{name}key.pem").chmod(0o600)
    (folder / "token").write_text(KEY + "\n")
    (folder / "token").chmod(0o600)
    return folder


def settings(folder: Path, **change: Any) -> Settings:
    names = {"tls_cert": "cert.pem", "tls_key": "key.pem", "tls_token_file": "token"}
    given = {"tls_host": "127.0.0.1"} | {name: folder / file for name, file in names.items()} | change
    env = {f"LLM_DAEMON_{name.upper()}": str(value) for name, value in given.items() if value is not None}
    return Settings.load(env, file=str(folder / "none.toml"))


@asynccontextmanager
async def listening(w: World, folder: Path) -> AsyncIterator[int]:
    """The port of a TLS listener beside the world's own two."""
    with own_port() as port:
        sock = remote.bind(settings(folder, tls_port=port))
        await w.gateway.serve_remote(sock, remote.context(settings(folder)), remote.key(settings(folder)))
        yield port


async def reach(w: World, folder: Path, port: int, host: str = "box.example") -> Client:
    trusted = ssl.create_default_context(cafile=str(folder / "cert.pem"))
    streams = await asyncio.open_connection("127.0.0.1", port, ssl=trusted, server_hostname="box.example")
    client = Client(*streams, host=host)
    w._clients.append(client)
    return client


@needs_openssl
def test_every_route_needs_the_users_own_key(run: Any, world: Any, made: Path) -> None:
    async def main() -> None:
        async with world() as w, listening(w, made) as port:
            client = await reach(w, made, port)
            routes = [("POST", path) for path in sorted(RELAYED)] + [
                ("GET", path) for path in ("/health", "/v1/models", "/metrics", "/ui/", "/api/status", "/upstream/m/")
            ]
            for method, path in routes:
                form = method == "POST" and RELAYED[path].multipart
                body: dict[str, Any] = {"body": FORM, "content_type": "multipart/form-data; boundary=x"} if form else {}
                for token in (None, TOKEN, KEY[:-1], KEY + "x", ""):  # this machine's token is not for others
                    assert (await client.ask(method, path, token=token, **body)).status == 401, (path, token)
                assert (await client.ask(method, path, token=KEY, **body)).status == 200
            assert {ask.via for ask in w.desk.log.all("open")} == {"tls"}
            assert "tls_token_file" in (await client.ask(token=TOKEN)).error["hint"]
            local = await w.client()
            wrong = await local.ask(token=KEY)
            assert (wrong.status, "llm-daemon env" in wrong.error["hint"]) == (401, True)
            assert (await local.ask()).status == 200

    run(main())


@needs_openssl
def test_hosts_and_pages_over_tls(run: Any, world: Any, made: Path) -> None:
    async def main() -> None:
        async with world(origins=frozenset({"https://app.example"})) as w, listening(w, made) as port:
            client = await reach(w, made, port, host=f"box.example:{port}")
            for origin, status in (
                (f"https://box.example:{port}", 200), ("https://app.example", 200), (f"http://box.example:{port}", 403),
                ("https://evil.example", 403), ("null", 403),
            ):  # fmt: skip
                assert (await client.ask(token=KEY, origin=origin)).status == status, origin
            assert (await client.ask("GET", "/health", token=KEY, sec_fetch_site="cross-site")).status == 403
            assert (await client.ask(token=KEY, host=None)).status == 400
            page: dict[str, Any] = {"token": None, "accept": "text/html"}
            answer = await client.ask("GET", "/ui/", **page)  # a browser's person is asked, for no page is open here
            assert (answer.status, answer.headers["www-authenticate"].partition(" ")[0]) == (401, "Basic")
            shown = base64.b64encode(b":" + KEY.encode()).decode()
            assert (await client.ask("GET", "/ui/", **page, authorization=f"Basic {shown}")).status == 200

    run(main())


@needs_openssl
def test_streams_and_hang_ups_over_tls(run: Any, world: Any, made: Path) -> None:
    async def main() -> None:
        async with world() as w, listening(w, made) as port:

            async def script(call: Any) -> None:
                await call.begin_stream()
                await call.chunk(b"data: 1\n\n")
                assert await call.reader.read() == b""

            w.engine.script = script
            client = await reach(w, made, port)
            client.request(token=KEY)
            assert (await client.head()).status == 200
            assert await client.chunk() == b"data: 1\n\n"
            client.writer.transport.abort()
            await w.engine.log.until("gone")
            await w.desk.log.until("ended")

    run(main())


@needs_openssl
def test_who_speaks_no_tls_is_not_heard(run: Any, world: Any, made: Path) -> None:
    async def main() -> None:
        async with world() as w, listening(w, made) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: box.example\r\n\r\n")
            assert not (await reader.read()).startswith(b"HTTP")
            writer.close()
            old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
            old.set_ciphers("ALL:@SECLEVEL=0")
            with pytest.warns(DeprecationWarning):
                old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection("127.0.0.1", port, ssl=old)
            with pytest.raises(ssl.SSLCertVerificationError):
                await asyncio.open_connection("127.0.0.1", port, ssl=ssl.create_default_context(), server_hostname="box.example")
            assert (await (await reach(w, made, port)).ask("GET", "/health", token=KEY)).status == 200

    run(main())


# -- bytes that are no TLS, or not for long


class Hand:
    """A TLS client that shows the bytes it would send: `say` gives them, `hear` takes the server's."""

    def __init__(self, folder: Path, newest: ssl.TLSVersion) -> None:
        trusted = ssl.create_default_context(cafile=str(folder / "cert.pem"))
        trusted.maximum_version = newest
        self._in, self._out, self.whole = ssl.MemoryBIO(), ssl.MemoryBIO(), False
        self._tls = trusted.wrap_bio(self._in, self._out, server_hostname="box.example")

    def say(self, plain: bytes = b"") -> bytes:
        try:
            if self.whole:
                self._tls.write(plain)
            else:
                self._tls.do_handshake()
                self.whole = True
        except ssl.SSLWantReadError:
            pass
        return self._out.read()

    def hear(self, data: bytes) -> None:
        self._in.write(data)


def spoil(rng: Random, data: bytes) -> bytes:
    """With some bytes changed, cut off or put in."""
    out = bytearray(data)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(out) + 1)
        out[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
    return bytes(out[: rng.randrange(len(out) + 1)] if rng.random() < 0.3 else out)


async def trouble(rng: Random, folder: Path, port: int, sock: socket.socket) -> None:
    """One client that begins as a client should, perhaps, and then says something else, perhaps."""
    loop = asyncio.get_running_loop()
    sock.setblocking(False)
    await loop.sock_connect(sock, ("127.0.0.1", port))
    hand = Hand(folder, rng.choice([ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]))
    for _ in range(rng.randrange(4)):  # flights of a good handshake
        await loop.sock_sendall(sock, hand.say())
        if hand.whole:
            break
        hand.hear(await loop.sock_recv(sock, 65536))
    plain = b"POST /v1/embeddings HTTP/1.1\r\nHost: box.example\r\nContent-Length: 9\r\n\r\n"
    heads = [b"", b"\x16\x03\x01\x02\x00", b"\x17\x03\x03\x00\x20", b"\x15\x03\x03\x00\x02\x02\x28", b"\x80\x2e\x01\x00\x02"]
    said = [rng.choice(heads) + rng.randbytes(rng.randrange(300)), plain, spoil(rng, hand.say(plain)), b""]
    await loop.sock_sendall(sock, rng.choice(said))
    if rng.random() < 0.3:
        await asyncio.sleep(0)
        sock.shutdown(socket.SHUT_WR)
    if rng.random() < 0.3:
        async with asyncio.timeout(0.01):
            await loop.sock_recv(sock, 65536)
    if rng.random() < 0.3:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@needs_openssl
def test_handshakes_of_every_kind_break_nothing(run: Any, world: Any, made: Path) -> None:
    async def main() -> None:
        async with world() as w, listening(w, made) as port:
            rng = Random(os.environ.get("SEED", "tls"))
            for _ in range(ROUNDS):
                with socket.socket() as sock, suppress(OSError):  # a time-out and what TLS complains of are such too
                    await trouble(rng, made, port, sock)
            client = await reach(w, made, port)
            assert (await client.ask(token=KEY)).status == 200
            await client.close()
            async with asyncio.timeout(20):
                while w.gateway.connections:  # noqa: ASYNC110  (of their end there is no event)
                    await asyncio.sleep(0.001)
            assert len(w.engine.calls) == 1

    run(asyncio.sleep(0))  # the first loop of a process opens files that stay: libuv's pipe for signals
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    run(main())
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before


@needs_openssl
@pytest.mark.parametrize("flights", [0, 1])
def test_half_a_handshake_is_not_waited_for_for_ever(run: Any, world: Any, made: Path, flights: int) -> None:
    async def main() -> None:
        async with world(patience=0.2) as w, listening(w, made) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            hand = Hand(made, ssl.TLSVersion.TLSv1_3)
            for _ in range(flights):
                writer.write(hand.say())
            with suppress(ConnectionError):
                while await reader.read(65536):
                    pass
            writer.transport.abort()

    run(main())


@needs_openssl
def test_nobody_may_shake_hands_twice(run: Any, world: Any, made: Path) -> None:
    async def main() -> None:
        async with world() as w, listening(w, made) as port:
            assert OPENSSL is not None
            process = await asyncio.create_subprocess_exec(
                OPENSSL, "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_2", "-CAfile", str(made / "cert.pem"),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(b"R\n")
            out = await process.stdout.read()  # its input stays open: at the end of that it would not wait for our answer
            process.stdin.close()
            await process.wait()
            assert b"RENEGOTIATING" in out and b"no renegotiation" in out
            assert (await (await reach(w, made, port)).ask(token=KEY)).status == 200

    run(main())


# -- settings


def refusal(folder: Path, **change: Any) -> str:
    with pytest.raises(UsageError) as caught:
        remote.bind(settings(folder, **change))
    assert caught.value.code == "bad_config"
    return f"{caught.value} {caught.value.hint}"


@needs_openssl
@pytest.mark.parametrize("name", ["tls_cert", "tls_key", "tls_token_file"])
def test_each_file_must_be_there(made: Path, name: str) -> None:
    assert name in refusal(made, **{name: None})
    for path, why in ((made / "absent", "No such file"), (made, "Is a directory")):
        assert f"{name} {path} cannot be read: {why}" in refusal(made, **{name: path})


@needs_openssl
def test_files_that_do_not_fit(made: Path, tmp_path: Path) -> None:
    assert "mismatch" in refusal(made, tls_key=made / "other-key.pem").lower()
    assert "PEM" in refusal(made, tls_cert=made / "token")
    assert OPENSSL is not None
    locked = tmp_path / "locked.pem"
    command = [OPENSSL, "ec", "-aes256", "-passout", "pass:secret", "-in", str(made / "key.pem"), "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    locked.chmod(0o600)
    assert "without a password" in refusal(made, tls_key=locked)


@needs_openssl
def test_secrets_that_others_can_read(made: Path, tmp_path: Path) -> None:
    for name, file, modes in (("tls_token_file", "token", (0o604, 0o640, 0o602)), ("tls_key", "key.pem", (0o604, 0o644, 0o602))):
        copy = Path(shutil.copy(made / file, tmp_path))
        for mode in modes:
            copy.chmod(mode)
            assert "can be read by" in (text := refusal(made, **{name: copy})) and f"chmod 600 {copy}" in text
        copy.chmod(0o600)
        with own_port() as port:
            remote.bind(settings(made, **{name: copy, "tls_port": port})).close()


@needs_openssl
@pytest.mark.parametrize("text", ["", "short", "x" * 23, "two words of enough characters", "ü" * 30])
def test_keys_that_can_be_guessed(made: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    file.chmod(0o600)
    assert "24" in refusal(made, tls_token_file=file)


@needs_openssl
def test_a_port_that_is_taken(made: Path) -> None:
    with own_port() as port, remote.bind(settings(made, tls_port=port)), pytest.raises(Unavailable, match="cannot be used"):
        remote.bind(settings(made, tls_port=port))


def test_no_other_address_without_tls(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::", "box.example"):
        with pytest.raises(UsageError, match="loopback"):
            Settings.load({"LLM_DAEMON_HOST": host}, file=str(tmp_path / "none.toml"))
    with pytest.raises(UsageError, match="tls_host needs"):
        remote.bind(Settings.load({"LLM_DAEMON_TLS_HOST": "0.0.0.0"}, file=str(tmp_path / "none.toml")))


@contextmanager
def own_port() -> Iterator[int]:
    """A port that nobody else is given: bound here, without listening, so that who sets SO_REUSEADDR can have it too."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]
