"""What counts against a start, and what does not; the rest is in tests/test_lifecycle_twin.py."""

from __future__ import annotations

import pytest

from llm_daemon import errors
from llm_daemon.core.rendezvous import CONNECT, FAILURES, SPAWNS, VANISHED, Attempt


def test_a_row_of_killed_candidates_is_no_reason_to_give_up_soon() -> None:
    attempt = Attempt(deadline=20)
    for _ in range(SPAWNS - 1):
        assert attempt.verdict(errors.Bug("no word", code=VANISHED), "it ended without a report") is CONNECT
    with pytest.raises(errors.Bug, match=f"started {SPAWNS} times"):
        attempt.verdict(errors.Bug("no word", code=VANISHED), "it ended without a report")


def test_the_same_complaint_three_times_is_the_answer() -> None:
    attempt = Attempt(deadline=20)
    for _ in range(FAILURES - 1):
        assert attempt.verdict(errors.Unavailable("no space", code="daemon_start"), "ERR ...") is CONNECT
    with pytest.raises(errors.Unavailable, match="no space"):
        attempt.verdict(errors.Unavailable("no space", code="daemon_start"), "ERR ...")


def test_what_only_the_caller_can_help_is_told_at_once() -> None:
    with pytest.raises(errors.UsageError):
        Attempt(deadline=20).verdict(errors.UsageError("bad config"), "ERR ...")


def test_one_that_served_and_left_is_not_counted() -> None:
    attempt = Attempt(deadline=20)
    for _ in range(3 * SPAWNS):
        assert attempt.verdict(None, "ALREADY") is CONNECT
