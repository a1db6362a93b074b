"""The product's machines decide what the model says, in every order that Hypothesis finds; and each mistake would be found."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from llm_daemon import errors
from llm_daemon.core.leases import Leases
from llm_daemon.core.rendezvous import ALREADY, CONNECT, GIVE_UP, SPAWN, WAIT, WAKE, WON, Attempt, Election

from .lifecycle_twin import AGAIN, BORN, EVENTS, SCENES, SECOND, UP, Daemon, Twin

Twin.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestTwin = Twin.TestCase


@pytest.mark.parametrize("scene", SCENES)
def test_scene(scene: str) -> None:
    played(Twin, SCENES[scene])


def test_every_event_has_a_scene() -> None:
    words = {word.partition(":")[0] for trace in SCENES.values() for word in trace.split()}
    assert not set(EVENTS) - words


def played(twin_class: type[Twin], trace: str) -> None:
    twin = twin_class()
    twin.play(trace)
    twin.teardown()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_long_run_exercises_every_event() -> None:
    seen: Counter[str] = Counter()

    class Counted(Twin):
        def was(self, name: str | None, who: int) -> None:
            super().was(name, who)
            seen[name or "unseen"] += 1

    run_state_machine_as_test(Counted, settings=settings(max_examples=5000, stateful_step_count=60, deadline=None))
    assert not set(EVENTS) - set(seen), seen


# Mutants ------------------------------------------------------------------------------------------------------------
class TrustsTheVerdict(Attempt):  # M1, the client's half
    told = False

    def verdict(self, error: errors.LlmDaemonError | None, words: str) -> str:
        self.told = error is None
        return super().verdict(error, words)

    def down(self) -> str:
        if self.told:
            raise errors.Bug("told it is up, found nothing")
        return super().down()


class LooksOnce(Attempt):
    def start_taken(self) -> str:
        super().start_taken()
        return SPAWN


class KeepsStart(Attempt):
    def _again(self, pause: float) -> str:
        self.pause = pause
        return CONNECT


class StartsAnotherWhenBusy(Attempt):
    def busy(self, error: errors.Unavailable) -> str:
        super().busy(error)
        return SPAWN


class NeverDisbelievesStart(Attempt):
    def start_busy(self, now: float) -> str:
        return self._again(0.05)


class HasNoDeadline(Attempt):
    def check(self, now: float) -> None:
        pass


class LeavesWhenBusy(Election):  # M1, the candidate's half
    def busy(self, served: bool, now: float) -> str:
        return ALREADY


class GivesUpAtOnce(Election):
    def busy(self, served: bool, now: float) -> str:
        return ALREADY if served else GIVE_UP


class WakesAgainAndAgain(Election):
    def busy(self, served: bool, now: float) -> str:
        step = super().busy(served, now)
        return WAKE if step is WAIT else step


class ChecksNoInode(Election):  # M3
    def locked(self, same: bool) -> str:
        return WON


class IgnoresHolders(Leases):  # M4
    def settle(self, busy: bool, now: float) -> None:
        if self.exit_at is None:
            self.exit_at = now + self.linger


class HasAbsoluteNames(Daemon):  # M6
    @property
    def has_names(self) -> bool:
        return True


class LooksAtNoDoor(Daemon):
    @property
    def is_at_door(self) -> bool:
        return False


class IsNeverDeposed(Daemon):
    def is_deposed(self) -> bool:
        return False


class UnlinksLate(Twin):  # M2: a daemon that has left gets to its unlink in the morning
    owes = False

    def was(self, name: str | None, who: int) -> None:
        super().was(name, who)
        self.owes |= name == "exit"

    def unseen(self, what: str, slot: int = 0) -> None:
        super().unseen(what, slot)
        if what == "night" and self.owes:
            self.sock = None
            self.was(None, 0)


# It ends with the first find: the number is for the one unlucky run in a thousand.
QUICK = settings(max_examples=3000, stateful_step_count=40, deadline=None, database=None, phases=[Phase.generate])
MUTANTS: dict[type, str] = {
    TrustsTheVerdict: f"{UP} idle:0 close:0 refused:0",
    LooksOnce: "refused:0 START:0",
    KeepsStart: f"{BORN} publish:0 verdict:0",
    StartsAnotherWhenBusy: f"{UP} connect:0 no-answer:0",
    NeverDisbelievesStart: "refused:0 START:0 refused:1 backoff:1 refused:1 no-START:1",
    HasNoDeadline: "refused:0 START:0 refused:1 night backoff:1",
    LeavesWhenBusy: f"{BORN} {SECOND} look:1",
    GivesUpAtOnce: f"{BORN} {SECOND} look:1",
    WakesAgainAndAgain: f"{BORN} {SECOND} look:1",
    ChecksNoInode: "refused:0 START:0 refused:0 spawn:0 open:0 lock:0 CLEAN reopen:0",
    IgnoresHolders: f"{UP} connect:0 accept:0 night tick:0",
    HasAbsoluteNames: f"{BORN} CLEAN enoent:0",
    LooksAtNoDoor: f"{UP} connect:0 night tick:0",
    IsNeverDeposed: f"{UP} connect:0 CLEAN going:0",
    UnlinksLate: f"{UP} idle:0 close:0 exit:0 {AGAIN} lock:1 check:1 publish:1 night",
}


def mutated(mutant: type) -> type[Twin]:
    if issubclass(mutant, Twin):
        return mutant
    fields = {Attempt: "attempt_class", Election: "election_class", Leases: "leases_class", Daemon: "daemon_class"}
    field = next(name for base, name in fields.items() if issubclass(mutant, base))
    return type(mutant.__name__, (Twin,), {field: mutant})


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutant: type) -> None:
    scene = MUTANTS[mutant]
    played(Twin, scene)
    with pytest.raises(AssertionError):
        played(mutated(mutant), scene)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_found_near_its_scene(mutant: type) -> None:
    twin_class = mutated(mutant)
    twin_class.scenes = (MUTANTS[mutant],)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(twin_class, settings=QUICK)
