"""Who gets in: every rule on every route, taken from the gateway's own list of routes."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from llm_daemon.core.routes import ANSWERED, RELAYED
from llm_daemon.daemon import guard
from llm_daemon.errors import EngineError

from .fakes import BODY, CHAT, TOKEN, EngineCall

ROUTES = [("POST", path) for path in sorted(RELAYED)] + [
    (method, path) for path in [*sorted(ANSWERED), "/v1/models/m"] for method in ("GET", "HEAD")
]
OTHERS = [("GET", CHAT), ("PUT", "/health"), ("GET", "/"), ("POST", "/v1/unknown"), ("OPTIONS", CHAT), ("DELETE", "/v1/models/m")]


def test_hosts_on_every_route(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            port = w.port
            good = [
                "127.0.0.1",
                f"127.0.0.1:{port}",
                "localhost",
                f"LOCALHOST:{port}",
                "[::1]",
                f"[::1]:{port}",
                f"127.9.9.9:{port}",
                "127.0.0.1:1",  # the near end of a tunnel
            ]
            bad = [
                "evil.example", f"evil.example:{port}", "127.0.0.1:0", f"localhost.evil.example:{port}", "0.0.0.0", "192.168.1.1",
                "127.0.0.1.evil.example", "localhost@evil.example", "", "[::]", "127.1", "localhost:", f"localhost:{port}:{port}",
                "2130706433", "::1",
            ]  # fmt: skip
            client = await w.client()
            for method, path in ROUTES + OTHERS:
                for host in good:
                    status = (await client.ask(method, path, host=host)).status
                    assert status not in (400, 401, 403), (method, path, host)
                    assert (status == 200) == ((method, path) in ROUTES)
                for host in bad:
                    answer = await client.ask(method, path, host=host)
                    assert answer.status == 403, (method, path, host)
                    assert method == "HEAD" or answer.error["code"] == "bad_host"
                assert (await client.ask(method, path, host=None)).status == 400
            assert len(w.desk.log.all("open")) == len(RELAYED) * len(good)

    run(main())


def test_two_hosts_are_refused(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            client.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n")
            assert (await client.answer()).status == 400

    run(main())


def test_origins_on_every_route(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            good = [f"http://127.0.0.1:{w.port}", f"http://localhost:{w.port}", f"http://[::1]:{w.port}"]
            bad = [
                "http://evil.example", "null", "http://localhost", "http://localhost:1", f"https://localhost:{w.port}", "",
                f"http://localhost:{w.port}.evil.example", f"http://localhost:{w.port}/", f"http://evil.example:{w.port}", "*",
                f"chrome-extension://localhost:{w.port}",
            ]  # fmt: skip
            client = await w.client()
            for method, path in ROUTES:
                for origin in good:
                    assert (await client.ask(method, path, origin=origin)).status == 200
                for origin in bad:
                    answer = await client.ask(method, path, origin=origin)
                    assert answer.status == 403, origin
                    assert not any(name.startswith("access-control") for name in answer.headers)

    run(main())


def test_tokens_on_every_route(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            good: list[dict[str, str]] = [
                {"authorization": f"Bearer {TOKEN}"}, {"authorization": f"bearer  {TOKEN}"}, {"x_api_key": TOKEN},
                {"authorization": "Bearer wrong", "x_api_key": TOKEN},
            ]  # fmt: skip
            bad: list[dict[str, str]] = [
                {}, {"authorization": f"Bearer {TOKEN}x"}, {"authorization": f"Bearer {TOKEN[:-1]}"}, {"authorization": "Bearer"},
                {"authorization": TOKEN}, {"authorization": f"Basic {TOKEN}"}, {"x_api_key": "tök"}, {"x_api_key": ""},
            ]  # fmt: skip
            client = await w.client()
            for method, path in ROUTES + OTHERS:
                is_open = path == "/health" or method == "OPTIONS"
                for headers in good:
                    assert (await client.ask(method, path, token=None, **headers)).status not in (401, 403)
                for headers in bad:
                    answer = await client.ask(method, path, token=None, **headers)
                    assert (answer.status == 401) != is_open, (method, path, headers)
                    if answer.status == 401:
                        assert answer.headers["www-authenticate"] == "Bearer"
                        assert method == "HEAD" or answer.error["type"] == "authentication_error"
                        assert method == "HEAD" or "Bearer" in answer.error["hint"]

    run(main())


def test_no_token_asked_for(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world(token=None, hosts=frozenset({"box.example"})) as w:
            client = await w.client()
            for method, path in ROUTES:
                assert (await client.ask(method, path, token=None)).status == 200
                assert (await client.ask(method, path, token=None, host=f"box.example:{w.port}")).status == 200
                assert (await client.ask(method, path, token=None, host="evil.example")).status == 403

    run(main())


def test_hosts_by_a_rule(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world(hosts=lambda name: name.endswith(".test")) as w:
            client = await w.client()
            assert (await client.ask("GET", "/health", host="a.test")).status == 200
            assert (await client.ask("GET", "/health", host="a.test.example")).status == 403

    run(main())


def test_the_unix_socket_asks_the_kernel_only(run: Any, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client(unix=True)
            for method, path in ROUTES:
                assert (await client.ask(method, path, token=None, host="anything", origin="http://x")).status == 200
            assert (await client.ask(token=None, host=None)).status == 200
            monkeypatch.setattr("os.geteuid", lambda: 4_000_000)
            stranger = await w.client(unix=True)
            stranger.request("GET", "/health")
            assert await stranger.closed()

    run(main())


def test_the_peers_uid_is_read() -> None:
    a, b = socket.socketpair(socket.AF_UNIX)
    with a, b:
        assert guard.peer_is_us(a)
    with socket.socket() as unconnected:
        assert not guard.peer_is_us(unconnected)


# -- routes and bodies


def test_own_routes(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            assert (await client.ask("GET", "/health?x")).json == {"status": "ok"}
            models = (await client.ask("GET", "/v1/models")).json
            assert (models["object"], [m["id"] for m in models["data"]]) == ("list", ["m", "a/b?context=1"])
            assert (await client.ask("GET", "/v1/models/a%2Fb%3Fcontext=1")).json["id"] == "a/b?context=1"
            answer = await client.ask("GET", "/v1/models/none")
            assert (answer.status, answer.error["code"]) == (404, "unknown_model")
            for path in ("/health", "/v1/models"):
                get, head = await client.ask("GET", path), await client.ask("HEAD", path)
                assert (head.status, head.headers, head.body) == (200, get.headers, b"")
            assert w.desk.log.items == []
            assert w.engine.log.items == []

    run(main())


def test_unknown_routes_and_wrong_methods(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            for path in ("/", "/v1", "/health/", "/v1/chat/completions/", "/v1/../health", "/%68ealth", "//health"):
                answer = await client.ask("GET", path)
                assert (answer.status, answer.error["type"]) == (404, "not_found_error")
                assert all(route in answer.error["hint"] for route in RELAYED | ANSWERED)
            wrong = [("GET", CHAT, "POST"), ("POST", "/health", "GET, HEAD"), ("DELETE", "/v1/models", "GET, HEAD")]
            for method, path, allow in wrong:
                answer = await client.ask(method, path)
                assert (answer.status, answer.headers["allow"]) == (405, allow)
            assert w.desk.log.items == []

    run(main())


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"not json", "JSON"),
        (b'{"model":"m"} x', "JSON"),
        (b"[]", "object"),
        (b'"m"', "object"),
        (b'{"model":1}', "model"),
        (b'{"stream":"yes"}', "stream"),
        (b'{"model":"\xff"}', "JSON"),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deep"),
    ],
)
def test_bad_bodies(run: Any, world: Any, body: bytes, word: str) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            answer = await client.ask(body=body)
            assert (answer.status, answer.error["code"], answer.error["type"]) == (400, "bad_json", "invalid_request_error")
            assert word in answer.error["message"]
            assert "\n" not in answer.error["message"]
            assert (await client.ask()).status == 200
            assert len(w.desk.log.all("open")) == 1

    run(main())


def test_bodies_without_a_model(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            for body in (b"{}", b'{"model":null,"stream":null}', b'{"model":""}'):
                assert (await client.ask(body=body)).status == 200
            assert [(ask.model, ask.stream) for ask in w.desk.log.all("open")] == [(None, False)] * 3

    run(main())


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "text/plain; application/json", ""])
def test_content_types_a_web_form_can_send(run: Any, world: Any, kind: str | None) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            answer = await client.ask(content_type=kind)
            assert (answer.status, answer.error["code"]) == (415, "bad_content_type")
            assert (await client.ask(content_encoding="gzip")).status == 415
            assert w.desk.log.items == []

    run(main())


def test_a_body_over_the_limit(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world(body_limit=1000) as w:
            for chunked in (False, True):
                client = await w.client()
                if chunked:
                    client.request(body=b"", content_length=None, transfer_encoding="chunked")
                    client.send(b"ffff\r\n" + b" " * 5000)
                else:
                    client.request(body=b" " * 5000)
                answer = await client.answer()  # although the body never comes to its end
                assert (answer.status, answer.headers["connection"]) == (413, "close")
                client.send(b" " * 100_000)
                assert await client.closed()
            exact = b'{"a":"' + b"x" * (1000 - 8) + b'"}'
            assert (await (await w.client()).ask(body=exact)).status == 200

    run(main())


def test_a_malformed_request_behind_a_good_one_waits_for_its_turn(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            client.send(client.raw("POST", CHAT, BODY) + b"rubbish\r\n\r\n")
            assert (await client.answer()).status == 200
            answer = await client.answer()
            assert (answer.status, answer.error["code"], answer.headers["connection"]) == (400, "bad_request", "close")
            assert await client.closed()

    run(main())


def test_a_refused_body_is_read_past(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            client.request(token="wrong", body=b"x" * 1_000_000)
            assert (await client.answer()).status == 401
            assert (await client.ask()).status == 200

    run(main())


def test_expect_100_continue(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            whole = client.raw("POST", CHAT, BODY, expect="100-continue")
            client.send(whole[: -len(BODY)])
            assert (await client.head()).status == 100
            client.send(BODY)
            assert (await client.answer()).status == 200
            assert "expect" not in w.engine.calls[0].headers
            # Behind a running request the 100 waits for its turn, else it would be read as part of that answer.
            gate = asyncio.Event()

            async def script(call: EngineCall) -> None:
                await gate.wait()
                await call.answer(b"{}")

            w.engine.script = script
            client.send(client.raw("POST", CHAT, BODY) + whole[: -len(BODY)])
            await w.engine.log.until("request", 2)
            gate.set()
            assert [(await client.answer()).status, (await client.head()).status] == [200, 100]
            client.send(BODY)
            assert (await client.answer()).status == 200
            refused = client.raw("POST", CHAT, BODY, token="wrong", expect="100-continue")
            client.send(refused[: -len(BODY)])
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (401, "close")

    run(main())


def test_java_clients_that_offer_http2(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            for _ in range(2):
                answer = await client.ask(connection="Upgrade, HTTP2-Settings", upgrade="h2c", http2_settings="AAEAAEAAAA")
                assert (answer.status, answer.body) == (200, b'{"ok":true}')
            assert [call.body for call in w.engine.calls] == [BODY, BODY]

    run(main())


def test_a_hostile_last_word_stays_json(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            words = 'x"}\r\n\r\nHTTP/1.1 200 OK\r\n'
            w.desk.when_opened = lambda ask, turn: w.desk.refuse(ask.ticket, EngineError("died", last_words=words))
            answer = await (await w.client()).ask()
            assert answer.error["last_words"] == words

    run(main())
