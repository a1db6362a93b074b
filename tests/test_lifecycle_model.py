"""The protocol under exhaustive search: no order of steps and faults breaks it, and each known mistake would be found."""

from __future__ import annotations

import pytest

from .lifecycle_model import MUTANTS, Model, explore


def test_one_client_and_every_fault() -> None:
    found = explore(Model(1, 3))
    assert (found.broken, found.stuck) == (None, None)
    assert found.states == 47_059  # a change of the model shows


def test_two_clients_without_faults() -> None:
    found = explore(Model(2, 3, faults=False))
    assert (found.broken, found.stuck) == (None, None)
    assert found.states == 22_350


@pytest.mark.parametrize("mutant", ["M1", "M2"])
def test_the_original_mistakes_need_no_fault_to_show(mutant: str) -> None:
    found = explore(Model(2, 3, frozenset({mutant}), faults=False))
    assert found.broken or found.stuck


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_clients_and_every_fault() -> None:
    found = explore(Model(2, 3))
    assert (found.broken, found.stuck) == (None, None)
    assert found.states == 2_338_815


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mutant", ["M3", "M4", "M6"])  # the others need no fault, see above
def test_every_other_mutant_is_caught(mutant: str) -> None:
    found = explore(Model(2, 3, frozenset({mutant})))
    assert found.broken or found.stuck, MUTANTS[mutant]
