"""What the core says to those that it turns away: errors in their form for the wire, one line each."""

from __future__ import annotations

from .. import errors
from ..spec import Spec
from .events import Wire
from .instance import Instance


def amount(n: int) -> str:
    """Bytes for people.

    >>> [amount(n) for n in (0, 230_000_000, 999_600_000, 5_240_000_000)]
    ['0 MB', '230 MB', '1.0 GB', '5.2 GB']
    """
    return f"{n / 1e6:.0f} MB" if n < 999_500_000 else f"{n / 1e9:.1f} GB"


def too_large(spec: Spec, need: int, budget: int) -> Wire:
    """It would not fit if it were alone."""
    error = errors.UsageError(
        f"{spec.model} needs about {amount(need)} of memory, all models together may have {amount(budget)}",
        code="too_large", need_bytes=need, budget_bytes=budget,
        hint="a smaller context, fewer parallel conversations or another quantization need less (`llm-daemon plan MODEL` "
        "shows what for); or raise memory_budget and `llm-daemon stop`: a daemon keeps what it was started with",
    )  # fmt: skip
    return error.to_wire()


def later(it: Instance, now: float) -> Wire:
    """The error of an instance that failed a moment ago, with the time to wait."""
    error = errors.from_wire(dict(it.error or {}))
    wait = error.data["retry_after"] = max(1, round(it.retry_at - now))
    if error.status >= 500:  # worth another try; what was the caller's move stays so
        error.status, error.hint = 503, f"a request starts it again in {wait} s at the earliest, `llm-daemon load` at once"
    return error.to_wire()


def expired(what: str) -> Wire:
    """A deadline that was not or cannot be met."""
    hint = "allow it more time, or ask again later"
    return errors.Unavailable(f"the request {what}", code="expired", status=504, hint=hint).to_wire()


def superseded() -> Wire:
    return errors.UsageError("a newer request took its place", code="superseded", status=409).to_wire()


def leaving() -> Wire:
    return errors.Unavailable("the daemon is leaving", code="draining", hint="ask again", retry_after=1).to_wire()


def stopped(spec: Spec) -> Wire:
    return errors.Unavailable(f"{spec.model} was stopped by hand", code="stopped", hint="ask again to load it").to_wire()


def queue_full(spec: Spec, limit: int) -> Wire:
    """Its lane holds as many as may wait."""
    return errors.Unavailable(
        f"{limit} requests of its lane already wait for {spec.model}",
        code="queue_full", hint="try again later, or raise queue_limit", retry_after=1,
    ).to_wire()  # fmt: skip
