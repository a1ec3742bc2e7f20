"""Every registered method passes the one suite."""

import pytest

from lowrank.adapter import METHODS
from lowrank.conformance import THEOREMS, check
from lowrank.targets import methods as _registers_them  # noqa: F401


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_method_is_what_it_states(name: str) -> None:
    verdicts = check(METHODS[name])
    assert len(verdicts) == len(THEOREMS)
    assert not {v.theorem: v.detail for v in verdicts if v.holds is False}
    assert sum(v.holds is True for v in verdicts) >= 12  # most theorems apply to any method
