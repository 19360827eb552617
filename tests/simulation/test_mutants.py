"""The simulation is a test, too: known mistakes in the shipped code have to be found by it."""

from __future__ import annotations

import dataclasses

import pytest

from tests.simulation.__main__ import failures
from tests.simulation.mutants import MUTANTS, Mutant, StaleMutantError, applied, mutated_source


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_is_found(mutant: Mutant) -> None:
    """Some seed breaks an invariant with the mistake in the code."""
    with applied(mutant):
        seeds = range(mutant.first, mutant.first + mutant.seeds)
        found = next(failures(seeds), None)
    assert found is not None, f"none of {seeds} has found: {mutant.name}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_code_is_whole_again(mutant: Mutant) -> None:
    """After a mutant the functions have their own code, and before it its text is found."""
    assert mutant.new in mutated_source(mutant)
    with applied(mutant):
        pass
    with applied(dataclasses.replace(mutant, name="again")):
        pass


def test_a_mutant_whose_text_is_gone() -> None:
    """A mutant that changes nothing any more fails by name."""
    mutant = dataclasses.replace(MUTANTS[0], old="no such text")
    with pytest.raises(StaleMutantError, match=MUTANTS[0].name), applied(mutant):
        pass
