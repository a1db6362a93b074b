"""Sessions that never ran: trials drawn from known distributions, in the very files a run leaves behind."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from llm_daemon_bench import records, results
from llm_daemon_bench.records import (
    Artifact,
    CaseInfo,
    Check,
    CheckpointInfo,
    Client,
    Conditions,
    Launch,
    Machine,
    Reached,
    Resources,
    ServerRef,
    ServerTimes,
    Session,
    Stream,
    TargetInfo,
    Tokens,
    Trial,
)
from llm_daemon_bench.results import Results

BEGAN = 1_790_000_000.0


@dataclass(frozen=True)
class Speed:
    """How a target behaves.  Times in ms; `within` and `between`: noise of trials and of launches, as shares.

    `stall`: chance of a trial that takes three times as long.  `right`: chance to pass a check.  `replies`: how many different
    ones it has for a case, the first the most likely, each of them right or wrong for good; 0: no two are equal.  `never`:
    chance by checkpoint that it is not reached.  `longer`: tokens of its replies, as a share.  `heat`: how much slower the
    last round is than the first.
    """

    queue: float = 5
    prefill: float = 200
    per_token: float = 10
    load: float = 600
    within: float = 0.02
    between: float = 0.01
    stall: float = 0.0
    right: float = 1.0
    replies: int = 0
    longer: float = 1.0
    heat: float = 0.0
    rss_mib: float = 500
    file_bytes: int = 100_000_000
    never: Mapping[str, float] = field(default_factory=dict)
    engine: str | None = None
    dies_in: int | None = None

    def slowed(self, by: float) -> Speed:
        """All of it slower by the share `by`."""
        times = {name: getattr(self, name) * (1 + by) for name in ("queue", "prefill", "per_token", "load")}
        return replace(self, **times)


@dataclass(frozen=True)
class Case:
    """`points`: (id, token of the reply at which it is reached; 1 is the first token, turn, SLO)."""

    id: str
    cache: records.Cache = "warm"
    points: Sequence[tuple[str, int, int, float | None]] = (("first_token", 1, 1, None), ("done", 40, 1, None))
    checked: bool = False
    cold_start: bool = False
    turns: int = 1
    heavy: float = 1.0

    def info(self) -> CaseInfo:
        points = tuple(
            CheckpointInfo(id=name, kind="tokens" if token > 1 else "event", text=f"tokens {token}", turn=turn, slo_ms=slo)
            for name, token, turn, slo in self.points
        )
        return CaseInfo(
            id=self.id, kind="chat", cache=self.cache, turns=self.turns, cold_start=self.cold_start, checked=self.checked,
            checkpoints=points,
        )  # fmt: skip


CHAT = Case("chat", points=(("first_token", 1, 1, 400.0), ("sentence1", 12, 1, None), ("t2_first", 1, 2, 500.0)), turns=2)
EXTRACT = Case(
    "extract-json",
    "cold",
    (("first_token", 1, 1, None), ("total", 25, 1, 600.0), ("complete", 40, 1, 900.0)),
    checked=True,
    cold_start=True,
    heavy=1.5,
)
CASES = (CHAT, EXTRACT)


def simulate(
    folder: Path,
    targets: Mapping[str, Speed],
    cases: Sequence[Case] = CASES,
    *,
    launches: int = 3,
    trials: int = 6,
    seed: int = 1,
    streams: bool = False,
    ended: bool = True,
) -> Results:
    """Writes a session of the name of the folder and reads it back with the real reader."""
    made = _Maker(folder.name, random.Random(seed), launches, trials)
    made.run(targets, cases)
    folder.mkdir(parents=True)
    (folder / results.TRIALS).write_bytes(b"".join(msgspec.json.encode(r) + b"\n" for r in made.lines))
    session = _session(folder.name, targets, cases, launches, trials, made.now if ended else None)
    (folder / results.SESSION).write_bytes(msgspec.json.encode(session))
    if streams:
        import gzip

        text = b"".join(msgspec.json.encode(_stream(t)) + b"\n" for t in made.lines if isinstance(t, Trial) and not t.error)
        (folder / results.STREAMS).write_bytes(gzip.compress(text, mtime=0))
    return results.load(folder)


def _session(
    name: str, targets: Mapping[str, Speed], cases: Sequence[Case], launches: int, trials: int, ended: float | None
) -> Session:
    return Session(
        id=name, bench_version="1.2.3", suite="simulated", suite_text="[suite]\n", suite_sha256="0" * 64,
        command=("llm-daemon", "bench", "run", "desk.toml"), began=BEGAN, ended=ended, trials=trials, launches=launches, seed=7,
        machine=Machine(os="Linux", kernel="6.1", python="3.11.9", cpu="Scripted CPU", cores=2, usable_cores=2, ram_mib=24_000),
        targets=tuple(_target(id_, speed) for id_, speed in targets.items()), cases=tuple(c.info() for c in cases),
    )  # fmt: skip


def _target(id_: str, speed: Speed) -> TargetInfo:
    server, model, quant = id_.split("/")
    return TargetInfo(
        id=id_, server=ServerRef(id=server, version="b1"), engine=speed.engine, model=model, params="135M", quant=quant,
        artifact=Artifact(path=f"models/{model}.{quant}.gguf", bytes=speed.file_bytes), argv=(server, "-m", "{artifact}"),
        command=f"{server} -m models/{model}.{quant}.gguf",
    )  # fmt: skip


class _Maker:
    def __init__(self, session: str, rng: random.Random, launches: int, trials: int) -> None:
        self.session, self.rng, self.launches, self.trials = session, rng, launches, trials
        self.now = BEGAN
        self.lines: list[Trial | Launch] = []
        self.right: dict[str, bool] = {}

    def run(self, targets: Mapping[str, Speed], cases: Sequence[Case]) -> None:
        for launch in range(1, self.launches + 1):
            shift = {t: math.exp(self.rng.gauss(0, s.between)) for t, s in targets.items()}
            for target, speed in targets.items():
                self.launch(target, speed, launch, shift[target])
                for case in cases:
                    if case.cold_start:
                        self.trial(target, speed, case, launch, 0, shift[target], "start")
            for round_ in range(self.trials + 1):
                for target in self.rng.sample(sorted(targets), len(targets)):
                    for case in cases:
                        self.trial(target, targets[target], case, launch, round_, shift[target], case.cache)

    def common(self, target: str, speed: Speed, launch: int) -> dict[str, Any]:
        server, model, quant = target.split("/")
        return {
            "session": self.session, "target": target, "server": ServerRef(id=server, version="b1"), "model": model,
            "quant": quant, "launch": launch, "process": f"{target}-{launch}", "at": self.now,
            "res": Resources(rss_mib=speed.rss_mib), "env": Conditions(load1=0.3, mhz=3000, temp_c=50, swap_in=0),
        }  # fmt: skip

    def launch(self, target: str, speed: Speed, launch: int, shift: float) -> None:
        self.now += 1
        ready = speed.load * shift * math.exp(self.rng.gauss(0, speed.within))
        cp = {"spawned": 2.0, "port_open": ready * 0.7, "ready": ready, "first_token": ready + speed.prefill, "slot_free": 30.0}
        points = {name: Reached(ms=ms) for name, ms in cp.items()}
        self.lines.append(Launch(**self.common(target, speed, launch), key=f"L{target}-{launch}", round=launch, cp=points))

    def trial(self, target: str, speed: Speed, case: Case, launch: int, round_: int, shift: float, cache: records.Cache) -> None:
        self.now += 1
        factor = shift * math.exp(self.rng.gauss(0, speed.within)) * (1 + speed.heat * round_ / self.trials)
        factor *= 3 if self.rng.random() < speed.stall else 1
        dead = speed.dies_in == launch
        for turn in range(1, case.turns + 1):
            timing = _Timing(speed, case, factor, self.rng)
            fields = {} if dead else timing.fields(turn, self.rng)
            said = "nothing" if dead else self.reply(target, speed, case)
            check = self.judge(said, speed) if case.checked and turn == case.turns and not dead else None
            self.lines.append(
                Trial(
                    **self.common(target, speed, launch),
                    **fields,
                    key=f"{target}-{case.id}-{cache}-{launch}-{round_}",
                    case=case.id,
                    cache=cache,
                    cache_ok=True,
                    turn=turn,
                    part=turn,
                    parts=case.turns,
                    round=max(round_, 1),
                    repeat=1,
                    warmup=round_ == 0 and cache != "start",
                    since_spawn_ms=speed.load * shift if cache == "start" else None,
                    error="the server closed the connection" if dead else None,
                    said=said,
                    check=check,
                    client=Client(cpu_ms=2.0, lag_p99_ms=0.2),
                )
            )

    def reply(self, target: str, speed: Speed, case: Case) -> str:
        """The name of the next one."""
        number = min(int(self.rng.expovariate(1)), speed.replies - 1) if speed.replies else len(self.lines)
        return f"{target} {case.id} {number}"

    def judge(self, said: str, speed: Speed) -> Check:
        """The same for the same reply."""
        if said not in self.right:
            self.right[said] = self.rng.random() < speed.right
        return Check(passed=self.right[said])


@dataclass
class _Timing:
    speed: Speed
    case: Case
    factor: float
    rng: random.Random

    def fields(self, turn: int, rng: random.Random) -> dict[str, Any]:
        s, f = self.speed, self.factor
        prefill, rate = s.prefill * self.case.heavy * f, s.per_token * f
        first, out = s.queue * f + prefill, round(45 * s.longer)
        cp = {}
        for name, token, its_turn, _ in self.case.points:
            if its_turn != turn:
                continue
            at = 1 if token == 1 else round(token * s.longer)
            missed = rng.random() < s.never.get(name, 0)
            cp[name] = Reached(ms=None, censored_ms=first + out * rate) if missed else Reached(ms=first + (at - 1) * rate, tok=at)
        last = first + (out - 1) * rate
        found: dict[str, Any] = {
            "cp": cp, "t_ms": {"connect": 0.2, "headers": 2.0, "first_token": first, "first_content": first, "last_token": last},
            "server_ms": ServerTimes(prompt=prefill, decode=last - first), "decode_ms_per_tok": rate,
            "tokens": Tokens(prompt=100, cached=0, out=out, first=1, source="usage"), "finish": "stop",
        }  # fmt: skip
        return found


def _stream(trial: Trial) -> Stream:
    """One event a token, as the trial says they came."""
    first, out, rate = trial.t_ms["first_token"], trial.tokens.out or 0, trial.decode_ms_per_tok or 0
    event = b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": "word "}}]}).encode() + b"\n\n"
    return Stream.of(trial.key, trial.part, [(first + i * rate, event) for i in range(out)])
