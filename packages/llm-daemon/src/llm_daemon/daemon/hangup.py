"""How long an engine holds on to a request whose client has gone: measured on its own socket, as the gateway would leave it.

All slots are busy: one with the *victim*, the others with *company*, requests that stream all the while.  One more, the *probe*,
asks for one token and has to wait.  Then the victim's client leaves: by half-closing the connection where the engine confirms
that, else by closing it.  `freed` is the time until the probe's first token, less what a probe takes when a slot is free;
`closed` the time until the engine has closed its side too, which is when the gateway counts the slot as free.

An engine with one slot is measured alone, one with more beside streams.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any, cast

from ..core.assemble import ask_to_stream
from ..core.openai import rewritten
from ..engines.base import Plan
from ..errors import EngineError, EngineTimeout
from .address import connect
from .upstream import LET_GO

ROUTE = "/v1/chat/completions"
STREAMING, ASSEMBLED, PLAIN = "streaming", "non-streaming", "plain"
KINDS = (STREAMING, ASSEMBLED, PLAIN)
COMPANY_TOKENS = 4000  # longer than a measurement; some engines end it where the context is full, vLLM refuses what has no room
SAMPLE_TOKENS = 32  # from which the length of a victim is found
LEAD = 0.1  # seconds until a request that says nothing certainly runs, and until the probe certainly waits
SPREAD = 1.0  # seconds over which hang-ups of silent requests are spread: llama.cpp looks for them once a second
PATIENCE = 60.0  # seconds until any one step must be over
HEARD = 65536  # bytes of an answer to look for its first event in


@dataclass(frozen=True, slots=True)
class HangUp:
    """One hang-up, in ms from it.  `closed` is None if the engine did not, or confirms nothing; `left`: what remained."""

    freed: float
    closed: float | None
    left: float

    @property
    def ms(self) -> float:
        """Until the engine has let go for certain."""
        return max(self.freed, self.closed or 0.0)

    @property
    def noticed(self) -> bool:
        """Whether the request ended because of the hang-up, and not by itself; how long it would have lived is an estimate.

        >>> HangUp(20.0, 21.0, 3000.0).noticed, HangUp(2400.0, None, 3000.0).noticed
        (True, False)
        """
        return self.ms < self.left / 2


@dataclass(frozen=True, slots=True)
class HangUps:
    """All hang-ups of one kind of request; never empty."""

    each: tuple[HangUp, ...]

    @property
    def ms(self) -> float:
        return median(one.ms for one in self.each)

    @property
    def noticed(self) -> bool:
        """Whether most were."""
        return 2 * sum(one.noticed for one in self.each) > len(self.each)

    def to_json(self) -> dict[str, Any]:
        return {"ms": round(self.ms, 1), "noticed": self.noticed, "each": [asdict(one) for one in self.each]}


async def measure(
    path: str, plan: Plan, *, times: int = 5, natural: float = 4.0, room: int = COMPANY_TOKENS,
    on_step: Callable[[str], None] = lambda kind: None,
) -> dict[str, HangUps]:  # fmt: skip
    """`times` hang-ups of each of `KINDS` at the ready engine at the address `path`, which nobody else uses meanwhile.

    `streaming`; `non-streaming` as the gateway asks, which is as a stream where the plan has the route in `assembled`; and
    `plain`, as the client would ask itself.  `natural`: seconds that a victim lives undisturbed, or fewer where `room`, the
    most tokens that may be asked for, are sooner written.  `on_step` hears each kind when it begins.  Takes some seconds for
    each kind, and `times * natural` for one whose hang-up nobody notices.

    Raises EngineError (`not_measured`) if the engine does not answer as it should, or serves more at once than `plan.slots`;
    EngineTimeout if it does not answer at all.  Cancelling closes all connections.  Afterwards end the engine: one that does
    not notice hang-ups is still at work.
    """
    async with AsyncExitStack() as stack:
        bench = _Bench(path, plan, natural, room, stack)
        await bench.prepare()
        done: dict[str, HangUps] = {}
        for kind, body in bench.bodies().items():
            on_step(kind)
            done[kind] = HangUps(tuple([await bench.hang_up(body, (i + 0.5) / times) for i in range(times)]))
        return {**done, PLAIN: done.get(PLAIN, done[ASSEMBLED])}


def _body(tokens: int, **more: object) -> bytes:
    asked = [{"role": "user", "content": "Write a very long story about a river."}]
    return json.dumps({"messages": asked, "max_tokens": tokens, "ignore_eos": True, **more}).encode()


class _Bench:
    """One engine with its company, and what is known of its speed."""

    def __init__(self, path: str, plan: Plan, natural: float, room: int, stack: AsyncExitStack) -> None:
        self._path, self._plan, self._natural, self._room, self._stack = path, plan, natural, room, stack
        self._company: list[_Asked] = []
        self._normal = 0.0  # seconds to a probe's first token when a slot is free
        self._tokens = SAMPLE_TOKENS  # of a victim

    async def prepare(self) -> None:
        await self._fill()
        took = []
        for _ in range(4):
            async with self._ask(_body(1, stream=True), last=True) as probe:
                took.append(await probe.first_token() - probe.sent)
                await probe.end()
        self._normal = median(took[1:])  # the first one has the prompt still to read
        async with self._ask(_body(SAMPLE_TOKENS, stream=True), last=True) as sample:
            first = await sample.first_token()
            pace = max((await sample.end() - first) / (SAMPLE_TOKENS - 1), 1e-6)
        self._tokens = max(SAMPLE_TOKENS, min(self._room, int(self._natural / pace)))
        self._natural = min(self._natural, self._tokens * pace)

    def bodies(self) -> dict[str, bytes]:
        """What is asked of the engine for each kind; without `plain` where that is no different."""
        plain = _body(self._tokens)
        asked = ask_to_stream(ROUTE, plain) if ROUTE in self._plan.assembled else None
        streaming = {STREAMING: _body(self._tokens, stream=True)}
        return {**streaming, ASSEMBLED: plain} if asked is None else {**streaming, ASSEMBLED: asked[0], PLAIN: plain}

    async def hang_up(self, body: bytes, part: float) -> HangUp:
        """One hang-up, at `part` (0 to 1) of the time over which they are spread."""
        for _ in range(4):
            await self._fill()
            found = await self._try(body, part)
            if found is not None and not any(asked.gone for asked in self._company):
                return found
            await asyncio.sleep(self._natural)  # until what may still run has ended by itself
        raise EngineError("the next request never waits: it serves more at once than it says", code="not_measured")

    async def _fill(self) -> None:
        """Company in all slots but one."""
        self._company = [asked for asked in self._company if not asked.gone]
        while len(self._company) < self._plan.slots - 1:
            asked = await self._stack.enter_async_context(self._ask(_body(self._room, stream=True), last=True))
            await asked.first_token()
            self._company.append(asked)

    async def _try(self, body: bytes, part: float) -> HangUp | None:
        """None if the probe did not have to wait."""
        streams = json.loads(body).get("stream") is True
        async with self._ask(body) as victim:
            began = victim.sent
            if streams:
                began = await victim.first_token()
            else:
                await asyncio.sleep(LEAD)  # it says nothing until its end
            async with self._ask(_body(1, stream=True), last=True) as probe:
                await asyncio.sleep(LEAD + part * (LEAD if streams else min(SPREAD, self._natural / 4)))
                if victim.gone or probe.spoke:
                    return None
                at = victim.leave(self._plan.confirms_hangup)
                freed = await probe.first_token() - at - self._normal
                await probe.end()
            closed = await victim.closed()
        left = self._natural - (at - began)
        return HangUp(max(0.0, freed * 1e3), None if closed is None else (closed - at) * 1e3, left * 1e3)

    @asynccontextmanager
    async def _ask(self, body: bytes, last: bool = False) -> AsyncIterator[_Asked]:
        """A request on a connection of its own, closed at the end.  `last`: the engine closes it after its answer."""
        plan = self._plan
        if plan.served_id:
            body = rewritten(body, plan.served_id, frozenset())
        lines = [f"POST {plan.paths.get(ROUTE, ROUTE)} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        lines += [f"Content-Length: {len(body)}", *(f"{name}: {value}" for name, value in plan.headers), ""]
        head = "\r\n".join(lines)
        try:
            _, asked = await connect(self._path, _Asked)
        except OSError as e:
            raise EngineError(f"cannot connect to it: {e.strerror or e}", code="not_measured") from e
        try:
            asked.send(head.encode() + (b"Connection: close\r\n" if last else b"") + b"\r\n" + body)
            yield asked
        finally:
            asked.drop()


class _Asked(asyncio.Protocol):
    """One request; all times are perf_counter's.  `spoke`: its first event; `gone`: the connection's end."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.sent = self.spoke = self.gone = 0.0
        self._dropped = False
        self._heard = b""  # of the answer, until its first event
        self._told, self._over = asyncio.Event(), asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.spoke or len(self._heard) > HEARD:
            return
        self._heard += data
        if self._answers() and b"data: {" in self._heard:
            self.spoke, self._heard = perf_counter(), b""
            self._told.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = perf_counter()
        self._told.set()
        self._over.set()
        if self._timer is not None:
            self._timer.cancel()

    def send(self, message: bytes) -> None:
        self.sent = perf_counter()
        self.transport.write(message)

    def leave(self, confirms: bool) -> float:
        """The hang-up; returns its moment.  Who does not confirm within LET_GO loses the connection, as in upstream.py."""
        now = perf_counter()
        if confirms:
            self.transport.write_eof()
            self._timer = asyncio.get_running_loop().call_later(LET_GO, self.drop)
        else:
            self.drop()
        return now

    def drop(self) -> None:
        if not self.gone:
            self._dropped = True
            self.transport.abort()

    async def first_token(self) -> float:
        await self._wait(self._told)
        if not self.spoke:
            raise self._failure()
        return self.spoke

    async def end(self) -> float:
        """Of a whole answer."""
        await self._wait(self._over)
        if not self.spoke:
            raise self._failure()
        return self.gone

    async def closed(self) -> float | None:
        """When the engine closed the connection; None if we did."""
        await self._wait(self._over)
        return None if self._dropped else self.gone

    async def _wait(self, event: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                await event.wait()
        except TimeoutError:
            raise EngineTimeout(f"it did not answer within {PATIENCE:g} s") from None

    def _answers(self) -> bool:
        return self._heard[:5] == b"HTTP/" and self._heard[8:12] == b" 200"  # mlx-lm answers as HTTP/1.0

    def _failure(self) -> EngineError:
        line = self._heard.partition(b"\r\n")[0].decode("latin-1")
        body = self._heard.rpartition(b"\r\n\r\n")[2].decode(errors="replace")
        text = f"it answers {line!r} to {ROUTE}: {body[:300]}" if line else f"it closes the connection of {ROUTE}"
        return EngineError(text, code="not_measured")
