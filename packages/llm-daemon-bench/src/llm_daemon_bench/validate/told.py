"""V1: what a server says of itself, held against what we saw.  Works on any results, so each run can be checked."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..records import Trial
from .agreement import Bound, Line, hold

STEP = "V1"
ENOUGH = 64  # tokens: of fewer, the first and the last one's jitter is more than the bound
DECODE = Bound(part=0.02)
OVERHEAD_MS, OVERHEAD_PART = 50.0, 0.05  # more than either is worth a warning

MUCH = (
    ", which is much: HTTP, the chat template, tokenizing, and waiting for a slot or a core;"
    " if `llm-daemon bench doctor` finds the machine busy, measure again"
)


def decode_pairs(trials: Sequence[Trial]) -> list[tuple[float, float]]:
    """(ours, the server's) milliseconds a token, of each trial that is long enough to tell.

    The server's clock runs from the first token, which comes with the prompt, to the last: n - 1 steps.
    """
    pairs = []
    for trial in trials:
        out, server = trial.tokens.out, trial.server_ms.decode
        if out is None or out < ENOUGH or server is None or trial.decode_ms_per_tok is None or trial.error:
            continue
        pairs.append((trial.decode_ms_per_tok, server / (out - 1)))
    return pairs


def overheads(trials: Sequence[Trial]) -> list[tuple[float, float]]:
    """(first token as we saw it, the server's prompt time), ms: between the two lie HTTP, template, tokenizing and queue."""
    return [
        (t.t_ms["first_token"], t.server_ms.prompt)
        for t in trials
        if t.server_ms.prompt is not None and "first_token" in t.t_ms and not t.error and t.late_ms is None
    ]


def check(trials: Sequence[Trial]) -> list[Line]:
    """Lines for each target; none for targets whose server tells no times."""
    lines = []
    for target in dict.fromkeys(t.target for t in trials):
        mine = [t for t in trials if t.target == target]
        if pairs := decode_pairs(mine):
            lines.append(hold(STEP, f"{target}: decode, ms a token", "server timings", pairs, DECODE))
        if pairs := overheads(mine):
            lines.append(_overhead(target, pairs))
    return lines


def costly(over: float, reference: float) -> bool:
    """Whether an overhead of so many milliseconds over a prompt time is worth a warning."""
    return over > OVERHEAD_MS or over > OVERHEAD_PART * reference


def _overhead(target: str, pairs: list[tuple[float, float]]) -> Line:
    """The first token cannot come before the prompt was read; how much later it came is told."""
    reference = statistics.median(r for _, r in pairs)
    over = statistics.median(o - r for o, r in pairs)
    early = sum(o < r for o, r in pairs)
    note = f"{over:.1f} ms over the server's own prompt time" + (MUCH if costly(over, reference) else "")
    if early:
        note = f"{early} of {len(pairs)} first tokens came before the server had read the prompt"
    what = f"{target}: first token, not before the prompt"
    return Line(STEP, what, "server timings", reference + over, reference, n=len(pairs), note=note, agrees=not early)


def warnings(trials: Sequence[Trial]) -> list[str]:
    """What a person should know after a run: one line for each disagreement, and for a large overhead."""
    out = []
    for line in check(trials):
        if line.agrees is False and line.bound.part:
            out.append(f"{line.what}: {line.ours:.2f}, but {line.reference:.2f} by the server's own timings")
        elif not line.bound.part and (not line.agrees or costly(line.apart or 0.0, line.reference or 0.0)):
            out.append(f"{line.what}: {line.note}")
    return out
