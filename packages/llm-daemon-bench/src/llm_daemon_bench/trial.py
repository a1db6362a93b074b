"""One trial: a case on a server that is up, turn by turn or as a load, into the records of `results`."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any

import msgspec

from . import checkpoints, reply as replies
from .client import Raw, stream
from .meter import Meter
from .records import EVENTS, Cache, Check, Reached, Stream, Trial
from .reply import Reply
from .requests import Conversation, NoToolCall, fresh_nonce, greeting
from .servers import Server
from .suite import Case, Suite, Target

# Cached tokens that a cold prompt may have, for a template's head is the same for all: a share of it, or so many (of a short
# one no more than the larger share).
COLD_SHARE, COLD_TOKENS, SHORT_SHARE = 0.1, 64, 0.6
WARM_SHARE = 0.5
HANG_UP_TOKENS = 512
SLOT_S = 60.0


@dataclass(slots=True)
class Part:
    """One request of a trial, with what came of it."""

    turn: int
    stream: int
    at: float
    raw: Raw
    reply: Reply
    cp: dict[str, Reached] = field(default_factory=dict)
    check: Check | None = None
    late_ms: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Bench:
    """What a trial runs on."""

    suite: Suite
    target: Target
    server: Server

    def run(self, case: Case, record: Trial, cache: Cache) -> tuple[list[Trial], list[Stream]]:
        """The trial's records, each with what `record` has already, and its raw replies.

        Never raises for what the server does.  KeyboardInterrupt leaves nothing behind.
        """
        meter = Meter(self.server.pids())
        if cache == "warm":
            self._prime(case)
        meter.begin()
        try:
            parts = self._load(case, cache) if case.streams > 1 or case.table.rate else self._turns(case, cache, 1)
        finally:
            res, env, client = meter.end()
        out = []
        for number, part in enumerate(parts, 1):
            mine = self._record(record, part, cache, number, len(parts))
            out.append(msgspec.structs.replace(mine, res=res, env=env, client=client))
        raw = [Stream.of(record.key, n, p.raw.chunks) for n, p in enumerate(parts, 1) if p.raw.chunks]
        return out, raw

    def _prime(self, case: Case) -> None:
        """The same prompt goes through right before, for one token."""
        path, body = Conversation(case, self.target.server, self.server.model).next(1)
        for key in ("max_tokens", "n_predict"):
            if key in body:
                body[key] = 1
        stream(self.server.endpoint, path, body, stall_s=self._stall(case), timeout_s=case.table.timeout_s)

    def _stall(self, case: Case) -> float:
        return case.table.stall_s or self.suite.table.stall_s

    def _turns(self, case: Case, cache: Cache, number: int, due_ns: int | None = None) -> list[Part]:
        """One conversation.  After a turn that failed the others are not held, and say so."""
        talk = Conversation(case, self.target.server, self.server.model, fresh_nonce() if cache == "cold" else "")
        parts: list[Part] = []
        error: str | None = None
        for turn in range(1, len(case.turns) + 1):
            if error is None:
                try:
                    path, body = talk.next(turn)
                except NoToolCall as e:
                    error = str(e)
            if error is not None:
                parts.append(Part(turn, number, time.time(), Raw(0), Reply(), _unreached(case, turn), error=error))
                continue
            part, view = self._ask(case, turn, number, path, body, due_ns)
            parts.append(part)
            if part.error is not None:
                error = f"turn {turn} failed: {part.error}"
            talk.heard(view)
        if case.checks:
            parts[-1].check = checkpoints.judge(case, view) if error is None else Check(passed=False, why=error)
        return parts

    def _ask(
        self, case: Case, turn: int, number: int, path: str, body: dict[str, Any], due_ns: int | None
    ) -> tuple[Part, checkpoints.View]:
        at = time.time()
        began = perf_counter_ns()
        raw = stream(
            self.server.endpoint, path, body, stall_s=self._stall(case), timeout_s=case.table.timeout_s, t0_ns=due_ns,
            enough=_enough(case, turn) if case.table.early_stop else None,
        )  # fmt: skip
        reply = replies.parse(raw)
        whole = raw.finish == "done" and reply.error is None
        cp, view = checkpoints.evaluate(case, turn, reply.pieces, reply.t_ms, raw.end_ms, whole)
        part = Part(turn, number, at, raw, reply, cp, error=raw.error or reply.error)
        if due_ns is not None:
            part.late_ms = (began - due_ns) / 1e6
        return part, view

    # Load -------------------------------------------------------------------------------------------------------------

    def _load(self, case: Case, cache: Cache) -> list[Part]:
        """Many streams: `concurrency` workers, or one thread for each request at its time."""
        out: dict[int, Part] = {}
        if case.table.rate is not None:
            threads = self._open_loop(case, cache, out)
        else:
            left = iter(range(1, case.streams + 1))
            lock = threading.Lock()

            def work() -> None:
                while True:
                    with lock:
                        number = next(left, None)
                    if number is None:
                        return
                    out[number] = self._turns(case, cache, number)[0]

            threads = [threading.Thread(target=work, daemon=True) for _ in range(min(case.streams, case.table.concurrency or 1))]
            for thread in threads:
                thread.start()
        for thread in threads:
            thread.join()
        return [out[number] for number in sorted(out)]

    def _open_loop(self, case: Case, cache: Cache, out: dict[int, Part]) -> list[threading.Thread]:
        """Starts each request at its intended time, whatever the server does, and counts from that time."""
        rate = case.table.rate or 1.0
        chance = random.Random(f"{self.suite.table.seed}/{case.id}")
        due, threads = perf_counter_ns(), []
        for number in range(1, case.streams + 1):
            wait = (due - perf_counter_ns()) / 1e9
            if wait > 0:
                time.sleep(wait)  # the schedule of an open loop is the clock's

            def send(number: int = number, due: int = due) -> None:
                out[number] = self._turns(case, cache, number, due)[0]

            threads.append(threading.Thread(target=send, daemon=True))
            threads[-1].start()
            due += round(1e9 * (chance.expovariate(rate) if case.table.arrivals == "poisson" else 1 / rate))
        return threads

    # Records ----------------------------------------------------------------------------------------------------------

    def _record(self, record: Trial, part: Part, cache: Cache, number: int, parts: int) -> Trial:
        reply, raw = part.reply, part.raw
        counted = replies.tokens(reply)
        decode = replies.decode_ms_per_token(reply)
        t_ms = {name: round(reply.t_ms[name], 3) for name in EVENTS if name in reply.t_ms}
        spawned = self.server.spawn_ns
        return msgspec.structs.replace(
            record, turn=part.turn, stream=part.stream, part=number, parts=parts, at=part.at,
            process=self.server.name, cache=cache, cache_ok=cache_ok(cache, part.turn, counted.prompt, counted.cached),
            late_ms=None if part.late_ms is None else round(part.late_ms, 3),
            since_spawn_ms=round((raw.t0_ns - spawned) / 1e6, 3) if cache == "start" and raw.t0_ns else None,
            t_ms=t_ms, cp={name: _rounded(reached) for name, reached in part.cp.items()}, check=part.check, tokens=counted,
            server_ms=replies.server_times(reply), decode_ms_per_tok=None if decode is None else round(decode, 4),
            gaps=replies.gaps(reply.said), finish=reply.finish if raw.finish == "done" else raw.finish,
            said=replies.name_of(reply), error=part.error,
        )  # fmt: skip


def cache_ok(cache: Cache, turn: int, prompt: int | None, cached: int | None) -> bool | None:
    """Whether what the server says of its cache fits the cell; None if it says nothing, or nothing is promised.

    >>> cache_ok("cold", 1, 600, 20), cache_ok("cold", 1, 600, 590), cache_ok("warm", 1, 600, 590), cache_ok("asis", 1, 600, 0)
    (True, False, True, None)
    >>> cache_ok("cold", 1, 55, 24), cache_ok("cold", 1, 55, 54)  # the head of a short prompt, and all of it
    (True, False)
    """
    if cached is None or prompt is None or turn > 1 or cache == "asis":
        return None
    if cache == "warm":
        return cached >= WARM_SHARE * prompt
    return cached <= max(COLD_SHARE * prompt, min(COLD_TOKENS, SHORT_SHARE * prompt))


def _enough(case: Case, turn: int) -> Callable[[float, bytes], bool]:
    watch, parser = checkpoints.Watch(case, turn), replies.Parser()

    def look(ms: float, data: bytes) -> bool:
        reached = [watch.take(piece) for piece in parser.feed(ms, data)]
        return any(reached)

    return look


def _unreached(case: Case, turn: int) -> dict[str, Reached]:
    return {c.id: Reached(ms=None, censored_ms=0.0) for c in case.table.checkpoints if c.turn == turn}


def _rounded(reached: Reached) -> Reached:
    return Reached(
        ms=None if reached.ms is None else round(reached.ms, 3), tok=reached.tok,
        censored_ms=None if reached.censored_ms is None else round(reached.censored_ms, 3),
    )  # fmt: skip


# Lifecycle ------------------------------------------------------------------------------------------------------------


def first_token(bench: Bench) -> tuple[Reached, str | None]:
    """A fresh server's first token, after a short request of our own: milliseconds since its spawn; and what went wrong."""
    server, stall = bench.server, bench.suite.table.stall_s
    path, body = greeting(bench.target.server, server.model)
    raw = stream(server.endpoint, path, body, stall_s=stall, timeout_s=stall)
    return since_spawn(server, raw, replies.parse(raw))


def since_spawn(server: Server, raw: Raw, reply: Reply) -> tuple[Reached, str | None]:
    offset = (raw.t0_ns - server.spawn_ns) / 1e6
    ms = reply.t_ms.get("first_token")
    if ms is None:
        return Reached(ms=None, censored_ms=round(offset + raw.end_ms, 3)), raw.error or reply.error or "it said nothing"
    return Reached(ms=round(offset + ms, 3)), None


def slot_free(bench: Bench) -> Reached:
    """From a client's hang-up in the middle of a reply until the same slot has given another client its first token.

    Every slot of the server is kept busy meanwhile, so that no other one can serve.
    """
    server, table = bench.server, bench.target.server
    more = {"ignore_eos": True} if table.llamacpp else {}
    path, body = greeting(table, server.model, HANG_UP_TOKENS, **more)
    over, busy = threading.Event(), threading.Semaphore(0)

    def hold() -> None:
        said: list[int] = []

        def enough(ms: float, data: bytes) -> bool:
            if not said and b'"content":"' in data.replace(b" ", b""):
                said.append(1)
                busy.release()
            return over.is_set()

        stream(server.endpoint, path, body, stall_s=SLOT_S, timeout_s=SLOT_S, enough=enough)
        busy.release()

    others = [threading.Thread(target=hold, daemon=True) for _ in range(table.slots - 1)]
    for thread in others:
        thread.start()
    for _ in others:
        busy.acquire(timeout=SLOT_S)
    parser = replies.Parser()
    stream(
        server.endpoint, path, body, stall_s=SLOT_S, timeout_s=SLOT_S,
        enough=lambda ms, data: bool([p for p in parser.feed(ms, data) if p.text or p.reasoning]),
    )  # fmt: skip
    hung_up = perf_counter_ns()
    path, body = greeting(table, server.model)
    raw = stream(server.endpoint, path, body, stall_s=SLOT_S, timeout_s=SLOT_S)
    over.set()
    for thread in others:
        thread.join()
    ms = replies.parse(raw).t_ms.get("first_token")
    offset = (raw.t0_ns - hung_up) / 1e6
    if ms is None:
        return Reached(ms=None, censored_ms=round(offset + raw.end_ms, 3))
    return Reached(ms=round(offset + ms, 3))
