"""When in a round fragments are sent."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco_ray.algorithm.schedule import send_steps


@pytest.mark.parametrize(
    ("num_steps", "num_fragments", "expected"),
    [
        (100, 1, (100,)),
        (100, 4, (25, 50, 75, 100)),
        (100, 3, (34, 67, 100)),
        (24, 24, tuple(range(1, 25))),
        (3, 7, (1, 1, 2, 2, 3, 3, 3)),
        (1, 5, (1, 1, 1, 1, 1)),
    ],
)
def test_fragments_are_spread_over_the_round(num_steps: int, num_fragments: int, expected: tuple[int, ...]):
    assert send_steps(num_steps, num_fragments) == expected


@given(st.integers(1, 10**12), st.integers(1, 200))
def test_each_share_of_the_round_is_rounded_up_to_a_step(num_steps: int, num_fragments: int):
    """Exact for steps that a float could not hold."""
    found = send_steps(num_steps, num_fragments)
    assert len(found) == num_fragments
    assert found[-1] == num_steps
    for index, step in enumerate(found):
        assert step - 1 < Fraction(num_steps * (index + 1), num_fragments) <= step


def test_together_all_are_sent_at_the_end():
    assert send_steps(100, 4, together=True) == (100,) * 4


@pytest.mark.parametrize(("num_steps", "num_fragments"), [(0, 1), (1, 0), (-5, 2)])
def test_a_round_without_steps_or_fragments_is_refused(num_steps: int, num_fragments: int):
    for together in (False, True):
        with pytest.raises(ValueError, match=f"num_steps={num_steps}, num_fragments={num_fragments}"):
            send_steps(num_steps, num_fragments, together)
