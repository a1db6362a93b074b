"""Where each path goes, in which lane, and what of it the engine gets to see."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from llm_daemon.core import routes
from llm_daemon.core.routes import ASIDE, INTERACTIVE, REGULAR, RELAYED, Kind

from .fakes import BODY, CHAT, FORM, FORMS, TOKEN, EngineCall, until_gone

LANES = {
    "/v1/chat/completions": REGULAR, "/v1/responses": REGULAR, "/v1/messages": REGULAR, "/v1/embeddings": REGULAR,
    "/v1/rerank": REGULAR, "/v1/audio/speech": REGULAR, "/v1/audio/transcriptions": REGULAR, "/v1/audio/translations": REGULAR,
    "/v1/completions": INTERACTIVE, "/completion": INTERACTIVE, "/infill": INTERACTIVE,
    "/v1/messages/count_tokens": ASIDE, "/tokenize": ASIDE, "/detokenize": ASIDE, "/apply-template": ASIDE,
}  # fmt: skip
MODEL = "hf%3Aorg%2Frepo%40Q4"


def test_the_table_is_whole() -> None:
    assert LANES == {path: route.lane for path, route in RELAYED.items()}


@pytest.mark.parametrize("before", ["", f"/upstream/{MODEL}"])
def test_every_relayed_route_and_its_lane(run: Any, world: Any, before: str) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            for path, lane in LANES.items():
                kinds = {"content_type": "multipart/form-data; boundary=x"} if path in FORMS else {}
                body = FORM if kinds else BODY
                assert (await client.ask(path=before + path + "?a=b", body=body, **kinds)).status == 200, path
                ask, call = w.desk.log.all("open")[-1], w.engine.calls[-1]
                assert (ask.lane, ask.model, ask.stream) == (lane, "hf:org/repo@Q4" if before else "m", False)
                assert call.head.startswith(b"POST %b HTTP/1.1\r\n" % path.encode())  # a known route has no query
                assert (await client.ask("GET", before + path)).headers["allow"] == "POST"

    run(main())


@pytest.mark.parametrize("path", ["/metrics", "/ui", "/ui/", "/ui/app.js", "/api/status", "/api/explain/x-1", "/api/events"])
def test_the_admin_app_is_one_more_upstream_and_wakes_nobody(run: Any, world: Any, path: str) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            answer = await client.ask("GET", path + "?x=1", last_event_id="7")
            assert (answer.status, answer.body) == (200, b'{"ok":true}')
            assert w.engine.calls[0].head.startswith(b"GET %b?x=1 HTTP/1.1\r\n" % path.encode())
            assert w.engine.calls[0].headers["last-event-id"] == "7"
            assert (await client.ask("HEAD", path)).status == 200
            assert (await client.ask(path=path)).status == 200
            for method in ("PUT", "DELETE", "PATCH"):
                assert (await client.ask(method, path)).status == 405
            assert (await client.ask(path=path, content_type="text/plain")).status == 415
            assert w.desk.log.all("open") == [] and w.desk.overs == []
            assert not any(name.startswith(("x-llm-", "server-timing")) for name in answer.headers)

    run(main())


def test_the_admin_app_may_fail_to_start(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            reported: list[Any] = []
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context["exception"]))

            async def broken() -> str:
                raise OSError("no room")

            w.desk.admin = broken
            client = await w.client()
            answer = await client.ask("GET", "/metrics")
            assert (answer.status, answer.error["code"]) == (500, "bug")
            assert [str(error) for error in reported] == ["no room"]
            assert (await client.ask()).status == 200

    run(main())


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
def test_anything_else_is_passed_to_the_model_that_the_path_names(run: Any, world: Any, method: str) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            target = f"/upstream/{MODEL}/slots/0?action=erase&x=%20y&model=other"
            answer = await client.ask(method, target, body=b"")
            assert (answer.status, answer.body, answer.headers["x-llm-instance"]) == (200, b'{"ok":true}', "m#1")
            call, ask = w.engine.calls[0], w.desk.log.all("open")[0]
            assert call.head.startswith(b"%b /slots/0?action=erase&x=%%20y&model=other HTTP/1.1\r\n" % method.encode())
            assert (ask.model, ask.lane, ask.path) == ("hf:org/repo@Q4", ASIDE, f"/upstream/{MODEL}/slots/0")
            body = b'{"model":"other","stream":true}'
            head = client.raw(method, target, None, content_type="application/json", content_length=str(len(body)))
            client.send(head + body)
            assert (await client.answer()).status == 200
            ask = w.desk.log.all("open")[1]
            assert (ask.model, ask.lane, ask.stream) == ("hf:org/repo@Q4", REGULAR, True)  # it may generate: it takes a slot
            assert (w.engine.calls[1].body, w.engine.calls[1].headers["content-type"]) == (body, "application/json")
            for kind in ("text/plain", "application/x-www-form-urlencoded", None):
                client.send(client.raw(method, target, None, content_type=kind, content_length=str(len(body))) + body)
                assert (await client.answer()).status == 415
            assert len(w.engine.calls) == 2

    run(main())


@pytest.mark.parametrize("path", ["/upstream", "/upstream/", "/upstream/m", "/upstream//x", "/Upstream/m/x"])
def test_paths_that_name_no_model_or_nothing_of_it(run: Any, world: Any, path: str) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            assert (await client.ask("GET", path)).error["code"] == "unknown_route"
            assert routes.find(path) is None
            assert w.desk.log.items == []

    run(main())


@pytest.mark.parametrize("path", ["/", "//completion", "/v1/../completion", "/%63ompletion", "/v1/chat/completions/"])
def test_the_engine_is_asked_the_path_as_it_was_sent(run: Any, world: Any, path: str) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            route = routes.find("/upstream/m" + path)
            assert route is not None and (route.kind, route.path) == (Kind.PASSED, path)
            assert (await client.ask(path="/upstream/m" + path)).status == 200
            assert w.engine.calls[0].head.startswith(b"POST %b HTTP/1.1\r\n" % path.encode())
            # The firewall looks at whatever an engine could take for one of its routes.
            answer = await client.ask(path="/upstream/m" + path, body=b'{"n_discard":-1}')
            assert (answer.status, answer.error["code"]) == (400, "refused_parameter")

    run(main())


async def page(call: EngineCall) -> None:
    await call.answer(b"<h1>hi</h1>", content_type="text/html")


def test_the_engines_own_page_asks_a_person_for_the_token(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            w.engine.script = page
            client = await w.client()
            browser: dict[str, Any] = {"token": None, "accept": "text/html,*/*", "accept_language": "de", "cookie": "a=b"}
            answer = await client.ask("GET", "/upstream/m/", **browser)
            assert (answer.status, answer.headers["www-authenticate"].partition(" ")[0]) == (401, "Basic")
            assert "token" in answer.headers["www-authenticate"]
            assert (await client.ask("GET", "/upstream/m/x", token=None)).headers["www-authenticate"] == "Bearer"
            assert (await client.ask("GET", "/v1/models", **browser)).headers["www-authenticate"] == "Bearer"
            for user in ("", "me", "me:you"):
                shown = base64.b64encode(f"{user}:{TOKEN}".encode()).decode()
                answer = await client.ask("GET", "/upstream/m/", **browser, authorization=f"Basic {shown}")
                assert (answer.status == 200) == (user != "me:you")  # a colon ends the name (RFC 7617)
            for shown in ("", "=", "%%%", base64.b64encode(TOKEN.encode()).decode()):
                answer = await client.ask("GET", "/upstream/m/", **browser, authorization=f"Basic {shown}")
                assert answer.status == 401
            answer = await client.ask("GET", "/upstream/m/", **browser | {"token": TOKEN})
            assert (answer.body, answer.headers["content-type"]) == (b"<h1>hi</h1>", "text/html")
            seen = w.engine.calls[-1].headers
            assert seen["accept-language"] == "de" and not seen.keys() & {"authorization", "cookie", "origin"}

    run(main())


def test_event_streams_pass_as_they_come(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            go = asyncio.Event()

            async def script(call: EngineCall) -> None:
                await call.begin_stream()
                await call.chunk(b"id: 8\ndata: one\n\n")
                await go.wait()
                await call.chunk(b"data: two\n\n")
                await call.chunk(b"")

            w.engine.script = script
            client = await w.client()
            client.request("GET", "/upstream/m/models/sse", last_event_id="7")
            assert (await client.head()).headers["content-type"] == "text/event-stream"
            assert await client.chunk() == b"id: 8\ndata: one\n\n"
            assert w.engine.calls[0].headers["last-event-id"] == "7"
            go.set()
            assert [await client.chunk(), await client.chunk()] == [b"data: two\n\n", b""]
            assert (await client.ask("GET", "/health")).status == 200

    run(main())


def test_head_gets_the_head_of_get_and_lets_the_engine_go(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            w.engine.script = page
            answer = await client.ask("HEAD", "/upstream/m/")
            assert (answer.status, answer.headers["content-length"]) == (200, "11")
            assert w.engine.calls[0].head.startswith(b"GET / ")

            async def endless(call: EngineCall) -> None:
                await call.begin_stream()
                await until_gone(call)

            w.engine.script = endless
            answer = await client.ask("HEAD", "/upstream/m/events")
            assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
            while w.engine.calls[1].connection not in w.engine.log.all("gone"):
                await w.engine.log.news()
            assert len(w.desk.log.all("ended")) == 2
            assert (await client.ask("GET", "/health")).status == 200

    run(main())


ORIGIN = "https://app.example"


def test_pages_of_allowed_origins_are_told_so_on_every_route(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world(origins=frozenset({ORIGIN})) as w:
            client = await w.client()
            wanted = "authorization,content-type,x-stainless-os,x-llm-lane"
            asked: dict[str, Any] = {"access_control_request_method": "POST", "access_control_request_headers": wanted}
            for path in (*LANES, "/health", "/v1/models", "/metrics", "/api/load", "/ui/", "/upstream/m/x"):
                answer = await client.ask("OPTIONS", path, token=None, origin=ORIGIN, **asked)
                assert (answer.status, answer.headers["access-control-allow-origin"]) == (204, ORIGIN)
                assert answer.headers["access-control-allow-headers"] == wanted  # whatever OpenAI's client adds
                assert "POST" in answer.headers["access-control-allow-methods"]
                assert "access-control-allow-credentials" not in answer.headers
                answer = await client.ask("OPTIONS", path, token=None, origin="https://evil.example", **asked)
                assert (answer.status, answer.error["code"]) == (403, "bad_origin")
                assert not any(name.startswith("access-control") for name in answer.headers)
                answer = await client.ask("OPTIONS", path, token=None)  # nobody's page
                assert answer.status == 204 and not any(name.startswith("access-control") for name in answer.headers)
                method = "POST" if path in LANES or path == "/api/load" else "GET"
                for origin in (ORIGIN, ORIGIN.upper()):
                    answer = await client.ask(method, path, origin=origin)
                    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, origin)
                    assert (answer.headers["vary"], answer.headers["content-type"]) == ("Origin", "application/json")
                    assert "X-LLM-Ticket" in answer.headers["access-control-expose-headers"]
                answer = await client.ask(method, path, origin=ORIGIN, token="wrong")
                assert (answer.status == 401) == (path not in ("/health", "/ui/"))  # an origin is no key
                assert answer.headers["access-control-allow-origin"] == ORIGIN  # else the page could not say why
            assert all("origin" not in call.headers for call in w.engine.calls)

    run(main())


@pytest.mark.parametrize("wanted", ["", ",", "a b", "x,", "x y, z", "x:y"])
def test_a_preflight_echoes_only_names_of_headers(run: Any, world: Any, wanted: str) -> None:
    async def main() -> None:
        async with world(origins=frozenset({ORIGIN})) as w:
            client = await w.client()
            asked: dict[str, Any] = {"access_control_request_method": "POST", "access_control_request_headers": wanted}
            answer = await client.ask("OPTIONS", CHAT, origin=ORIGIN, **asked)
            assert answer.status == 204 and "access-control-allow-headers" not in answer.headers

    run(main())


def test_http_1_0_clients_on_every_route(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            for method, path in [
                *(("POST", path) for path in LANES),
                ("GET", "/health"),
                ("GET", "/upstream/m/"),
                ("GET", "/ui/"),
            ]:
                client = await w.client()
                answer = await client.ask(method, path, version="1.0", connection="keep-alive")
                assert (answer.status, answer.headers["connection"]) == (200, "close")
                assert "transfer-encoding" not in answer.headers
                assert await client.closed()

    run(main())


IMAGE = b'{"model":"m","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"%b"}}]}]}'


REFUSED = [IMAGE % b"http://169.254.169.254/", b'{"n_discard":-1}', b'{"id_slot":0}', b'{"grammar":"%b"}' % (b"(" * 65)]
ENGINES = [CHAT, "/upstream/m" + CHAT, "/upstream/m/anything/else"]


@pytest.mark.parametrize("path", ENGINES)
def test_the_firewall_stands_before_every_engine(run: Any, world: Any, path: str) -> None:
    async def main() -> None:
        passed = [IMAGE % b"data:image/png;base64,iVBORw0KGgo=", b'{"n":2,"tools":[{"type":"function"}],"response_format":{}}']
        async with world() as w:
            client = await w.client()
            for body in REFUSED:
                answer = await client.ask(path=path, body=body)
                assert (answer.status, answer.error["code"]) == (400, "refused_parameter")
                assert answer.error["type"] == "invalid_request_error"
            assert w.desk.log.items == [] and w.gateway.held == 0
            for body in passed:
                assert (await client.ask(path=path, body=body)).status == 200
            assert [call.body for call in w.engine.calls] == passed

    run(main())


@pytest.mark.parametrize("path", ENGINES)
def test_remote_media_can_be_allowed_and_nothing_else(run: Any, world: Any, path: str) -> None:
    async def main() -> None:
        async with world(remote_media=True) as w:
            client = await w.client()
            assert [(await client.ask(path=path, body=body)).status for body in REFUSED] == [200, 400, 400, 400]

    run(main())
