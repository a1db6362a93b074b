"""The client that most programs use, against our gateway: it must be able to tell an answer from a failure."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from llm_daemon.errors import Unavailable

from .fakes import EngineCall, World, until_gone

MESSAGES: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "hi"}]
WHOLE = (
    b'{"id":"c","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"finish_reason":"stop",'
    b'"message":{"role":"assistant","content":"Hello there"}}]}'
)


def piece(text: str) -> bytes:
    choices = b'[{"index":0,"delta":{"content":"%b"}}]' % text.encode()
    return b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":%b}\n\n' % choices


async def talk(call: EngineCall) -> None:
    """An engine that answers, streams, or dies in mid-stream when told so."""
    if b"/v1/embeddings" in call.head:
        await call.answer(b'{"object":"list","model":"m","data":[{"object":"embedding","index":0,"embedding":[0.5,1.0]}]}')
    elif b'"stream":true' not in call.body.replace(b" ", b""):
        await call.answer(WHOLE)
    else:
        await call.begin_stream()
        await call.chunk(piece("Hello"))
        if b"die" in call.body:
            call.die()
            return
        if b"for ever" in call.body:
            await until_gone(call)
        await call.chunk(piece(" there"))
        await call.chunk(b"data: [DONE]\n\n")
        await call.chunk(b"")


def options(w: World) -> dict[str, Any]:
    return {"base_url": f"http://127.0.0.1:{w.port}/v1", "api_key": "plain", "max_retries": 0}


def test_async_client(run: Any, world: Any) -> None:
    async def main() -> None:
        async with world(token="plain") as w, openai.AsyncOpenAI(**options(w)) as llm:
            w.engine.script = talk
            assert [m.id async for m in llm.models.list()] == ["m", "a/b?context=1"]
            assert (await llm.models.retrieve("a/b?context=1")).id == "a/b?context=1"
            whole = await llm.chat.completions.create(model="m", messages=MESSAGES)
            assert whole.choices[0].message.content == "Hello there"
            vectors = await llm.embeddings.create(model="m", input="x", encoding_format="float")
            assert vectors.data[0].embedding == [0.5, 1.0]
            stream = await llm.chat.completions.create(model="m", messages=MESSAGES, stream=True)
            parts = [c.choices[0].delta.content async for c in stream]
            assert parts == ["Hello", " there"]

            dying = await llm.chat.completions.create(model="die", messages=MESSAGES, stream=True)
            with pytest.raises(openai.APIError, match="did not answer in full") as caught:
                [c async for c in dying]
            assert caught.value.code == "engine_gone"

            left = await llm.chat.completions.create(model="for ever", messages=MESSAGES, stream=True)
            await anext(aiter(left))
            await left.close()
            await w.desk.log.until("aborting")

            full = Unavailable("full", code="queue_full", retry_after=7)
            w.desk.when_opened = lambda ask, turn: w.desk.refuse(ask.ticket, full)
            with pytest.raises(openai.InternalServerError, match="full") as refused:
                await llm.chat.completions.create(model="m", messages=MESSAGES)
            assert (refused.value.status_code, refused.value.code) == (503, "queue_full")
            assert refused.value.response.headers["retry-after"] == "7"
            stranger = llm.with_options(api_key="wrong")
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()

    run(main())


def test_sync_client(run: Any, world: Any) -> None:
    def use(w: World) -> None:
        with openai.OpenAI(**options(w)) as llm:
            assert llm.chat.completions.create(model="m", messages=MESSAGES).choices[0].message.content == "Hello there"
            parts = [c.choices[0].delta.content for c in llm.chat.completions.create(model="m", messages=MESSAGES, stream=True)]
            assert parts == ["Hello", " there"]
            with pytest.raises(openai.APIError, match="did not answer in full"):
                list(llm.chat.completions.create(model="die", messages=MESSAGES, stream=True))

    async def main() -> None:
        async with world(token="plain") as w:
            w.engine.script = talk
            await asyncio.to_thread(use, w)

    run(main())
