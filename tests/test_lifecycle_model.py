"""The protocol under exhaustive search: no order of steps and faults breaks it, and each known mistake would be found."""

from __future__ import annotations

import pytest

from .lifecycle_model import MUTANTS, Model, explore


def test_one_client_and_every_fault() -> None:
    found = explore(Model(1, 3))
    assert (found.broken, found.stuck) == (None, None)
    assert found.states == 32_280  # a change of the model shows


def test_two_clients_without_faults() -> None:
    found = explore(Model(2, 3, faults=False))
    assert (found.broken, found.stuck) == (None, None)
    assert found.states == 13_269


@pytest.mark.parametrize("mutant", ["M1", "M2"])
def test_the_original_mistakes_need_no_fault_to_show(mutant: str) -> None:
    found = explore(Model(2, 3, frozenset({mutant}), faults=False))
    assert found.broken or found.stuck


@pytest.mark.slow
def test_two_clients_and_every_fault() -> None:
    found = explore(Model(2, 3))
    assert (found.broken, found.stuck) == (None, None)
    assert found.states == 1_301_226


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_mutant_is_caught(mutant: str) -> None:
    found = explore(Model(2, 3, frozenset({mutant})))
    assert found.broken or found.stuck, MUTANTS[mutant]
