"""Forms with files in them: whose model they name, what is too much, and that nothing held stays held."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from llm_daemon.errors import Unavailable

from .fakes import CHAT, Client, EngineCall, until_gone

AUDIO = "/v1/audio/transcriptions"
KIND = "multipart/form-data; boundary=x"
MB = 1 << 20


def part(name: str, value: bytes, more: str = "") -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (name.encode(), more.encode(), value)


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--x--\r\n"


def audio(size: int) -> bytes:
    return form(
        part("model", b"whisper"), part("file", b"\xff\r\n--" + b"\0" * size, '; filename="a.wav"\r\nContent-Type: audio/wav')
    )


def send(client: Client, body: bytes, kind: str = KIND, path: str = AUDIO, **headers: Any) -> None:
    client.request(path=path, body=body, content_type=kind, **headers)


@pytest.mark.parametrize(
    ("body", "kind", "model", "stream"),
    [
        (audio(10), KIND, "whisper", False),
        (form(part("stream", b"true"), part("model", b"a/b@Q4")), KIND, "a/b@Q4", True),
        (form(part("file", b'name="model"\r\n\r\nm', '; filename="model"')), KIND, None, False),  # a file is not looked at
        (form(part("file", b"x", '; filename="a"; name="model"')), KIND, None, False),
        (form(part("model", b"a"), part("model", b"b")), KIND, "b", False),
        (form(part("model", "형".encode())), KIND, "형", False),
        (form(part("model", b"m")), 'Multipart/Form-Data; charset=utf-8; Boundary="x"', "m", False),
        (b"\r\n" + form(part("model", b"m")), KIND, "m", False),
        (b'--x\r\ncontent-type: text/plain\r\ncontent-disposition: form-data; NAME=model\r\n\r\nm\r\n--x--', KIND, "m", False),
        (b"--x--\r\n", KIND, None, False),
    ],
)  # fmt: skip
def test_the_form_names_the_model(run: Any, world: Any, body: bytes, kind: str, model: str | None, stream: bool) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            for path in (AUDIO, "/v1/audio/translations"):
                send(client, body, kind, path)
                assert (await client.answer()).status == 200
                ask, call = w.desk.log.all("open")[-1], w.engine.calls[-1]
                assert (ask.model, ask.stream, call.body, call.headers["content-type"]) == (model, stream, body, kind)

    run(main())


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", KIND),
        (b'{"model":"m"}', KIND),
        (form(part("model", b"m")), "multipart/form-data"),
        (form(part("model", b"m")), "multipart/form-data; boundary=y"),
        (form(part("model", b"m")), 'multipart/form-data; boundary=""'),
        (part("model", b"m"), KIND),
        (part("model", b"m")[:-9], KIND),
        (b"--x\r\nno head\r\n--x--\r\n", KIND),
        (form(part("model", b"\xff")), KIND),
        (b"--x\r\n" * 20_000 + b"--x--\r\n", KIND),
    ],
)
def test_forms_that_cannot_be_read(run: Any, world: Any, body: bytes, kind: str) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            for path in (AUDIO, "/upstream/m/other"):
                send(client, body, kind, path)
                answer = await client.answer()
                if body or path == AUDIO:  # without a body there is no form to read
                    assert (answer.status, answer.error["code"]) == (400, "bad_form"), path
            assert len(w.desk.log.all("open")) == (not body)
            assert w.gateway.held == 0

    run(main())


def test_a_field_that_has_hurt_engines_reaches_none(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            for path in (AUDIO, "/upstream/m/other"):
                for bad in (part("n_discard", b"-1"), part("image", b"http://10.0.0.1/")):
                    send(client, form(part("model", b"m"), bad), path=path)
                    assert (await client.answer()).error["code"] == "refused_parameter"
            assert w.engine.calls == [] and w.gateway.held == 0

    run(main())


@pytest.mark.parametrize(("path", "kind"), [(CHAT, KIND), (AUDIO, "application/json"), (AUDIO, "multipart/mixed; boundary=x")])
def test_a_form_only_where_one_is_expected(run: Any, world: Any, path: str, kind: str) -> None:
    async def main() -> None:
        async with world() as w:
            client = await w.client()
            send(client, audio(10), kind, path)
            assert (await client.answer()).error["code"] == "bad_content_type"

    run(main())


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_file_passes_whole(run: Any, world: Any, chunked: bool) -> None:
    async def main() -> None:
        body = audio(8 * MB)
        async with world(body_limit=len(body)) as w:
            client = await w.client()
            if chunked:
                client.request(path=AUDIO, body=b"", content_type=KIND, content_length=None, transfer_encoding="chunked")
                for at in range(0, len(body), 100_000):
                    piece = body[at : at + 100_000]
                    client.send(b"%x;a=b\r\n%b\r\n" % (len(piece), piece))
                client.send(b"0\r\nX-Trailer: x\r\n\r\n")
            else:
                send(client, body)
            assert (await client.answer()).status == 200
            assert w.engine.calls[0].body == body
            assert w.engine.calls[0].headers["content-length"] == str(len(body))
            assert w.gateway.held == 0
            send(client, body + b" ")
            assert (await client.answer()).status == 413

    run(main())


def test_several_at_once_are_held_to_one_limit(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world(held_limit=3 * MB) as w:
            w.desk.hold()
            clients = [await w.client() for _ in range(2)]
            for client in clients:
                send(client, audio(MB))
            await w.desk.log.until("open", 2)
            assert 2 * MB < w.gateway.held < 3 * MB
            late = await w.client()
            send(late, audio(2 * MB))
            answer = await late.answer()
            assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "busy", "1")
            assert answer.error["type"] == "unavailable_error"
            assert await late.closed()
            assert 2 * MB < w.gateway.held < 3 * MB  # what the refused one had sent is not ours any more
            for ask in w.desk.log.all("open"):
                w.desk.turns[ask.ticket].run(w.desk.route)
            for client in clients:
                assert (await client.answer()).status == 200
            assert w.gateway.held == 0
            w.desk.when_opened = lambda ask, turn: turn.run(w.desk.route)
            send(client := await w.client(), audio(2 * MB))
            assert (await client.answer()).status == 200

    run(main())


async def until(is_so: Callable[[], bool]) -> None:
    """Of `held` there is no event."""
    while not is_so():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def half(call: EngineCall) -> None:
    await call.begin_stream()
    await until_gone(call)


@pytest.mark.parametrize(
    "way", ["cut", "wait", "run", "stream", "refused", "aborted", "lost", "replayed", "queued", "bad", "slow"]
)
def test_nothing_held_stays_held(run: Any, world: Any, way: str) -> None:
    """Whichever way a request ends."""

    async def main() -> None:
        async with world() as w:
            client = await w.client()
            body, error = audio(MB), Unavailable("no", code="no")
            whole = client.raw("POST", AUDIO, body, content_type=KIND)
            w.engine.script = half if way == "stream" else until_gone
            if way in ("cut", "slow"):
                client.send(whole[: MB // 2])
                await until(lambda: w.gateway.held > 0)
                if way == "cut":
                    await client.close()
                else:
                    w.gateway.patience = 0.0
                    w.gateway._look()
                    assert (await client.answer()).status == 408
            elif way == "bad":
                client.send(client.raw("POST", AUDIO, body[:-9], content_type=KIND))
                assert (await client.answer()).status == 400
            elif way in ("wait", "queued"):
                w.desk.hold()
                client.send(whole * (3 if way == "queued" else 1))
                await w.desk.log.until("open")
                await until(lambda: w.gateway.held == len(body) * (3 if way == "queued" else 1))
                await client.close()
                await w.desk.log.until("cancel")
            elif way == "refused":
                w.desk.when_opened = lambda ask, turn: w.desk.refuse(ask.ticket, error)
                client.send(whole)
                assert (await client.answer()).status == 503
            elif way in ("lost", "replayed"):
                seen: list[bytes] = []

                async def dies(call: EngineCall) -> None:
                    seen.append(call.body)
                    assert w.gateway.held == len(body)
                    call.die() if way == "lost" or len(seen) == 1 else await call.answer(b"{}")

                w.engine.script, w.desk.takes_back = dies, way == "replayed"
                client.send(whole)
                assert (await client.answer()).status == (200 if way == "replayed" else 502)
                assert seen == [body] * len(seen)
            else:
                client.send(whole)
                await w.engine.log.until("request")
                assert w.gateway.held == len(body)
                if way == "aborted":
                    w.desk.abort(w.desk.log.all("open")[0].ticket, error)
                    assert (await client.answer()).status == 503
                elif way == "stream":
                    assert (await client.head()).status == 200
                await client.close()
                await w.desk.log.until("ended")
            await until(lambda: not w.gateway.held)  # the client's end is noticed in one of the loop's next rounds

    run(main())
