"""The pace of a run: moving averages, the grace window of 2604.21428, inner steps by speed."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco_ray.coordination.pace import MOST_TIMES, NEWEST, Pace


def test_nothing_is_known_before_the_first_measurement():
    assert Pace().fastest_step_s == 0.0
    assert Pace().grace_s(5, 0.9, 100.0) == 0.0
    assert Pace().inner_steps("a", 50) == 50


def test_the_first_measurement_counts_in_full_and_each_later_one_in_part():
    pace = Pace().stepped("a", 2.0)
    assert pace.step_s == {"a": 2.0}
    assert pace.stepped("a", 4.0).step_s == {"a": pytest.approx((1 - NEWEST) * 2.0 + NEWEST * 4.0)}
    for _ in range(100):
        pace = pace.stepped("a", 4.0)
    assert pace.step_s["a"] == pytest.approx(4.0)


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_an_island_that_says_what_cannot_be_is_passed_over(nonsense: float):
    pace = Pace().stepped("a", 2.0)
    assert pace.stepped("a", nonsense) is pace
    assert pace.stepped("b", nonsense).inner_steps("b", 10) == 10


def test_the_speed_of_an_island_that_is_gone_does_not_count():
    pace = Pace().stepped("fast", 1.0).stepped("slow", 4.0)
    assert pace.inner_steps("slow", 8) == 2
    assert pace.forgotten("fast").fastest_step_s == 4.0
    assert pace.forgotten("fast").inner_steps("slow", 8) == 8
    assert pace.forgotten("nobody") is pace


def test_the_grace_window_takes_its_share_of_what_the_overlap_leaves():
    """grace <= gamma (tau step_time - quorum_time - sync_time)"""
    pace = Pace().stepped("a", 2.0).stepped("b", 3.0).launched(0, 10.0, 1.5).committed(0, 10.5)
    assert pace.grace_s(5, 0.9, 100.0) == pytest.approx(0.9 * (5 * 2.0 - 1.5 - 0.5))
    assert pace.grace_s(5, 0.5, 100.0) == pytest.approx(0.5 * (5 * 2.0 - 1.5 - 0.5))
    assert pace.grace_s(5, 0.0, 100.0) == 0.0
    assert pace.grace_s(5, 0.9, 3.0) == 3.0
    assert pace.grace_s(1, 0.9, 100.0) == 0.0
    assert pace.grace_s(0, 0.9, 100.0) == 0.0


def test_waits_for_quorum_and_commit_are_moving_averages():
    pace = Pace().launched(0, 0.0, 1.0).committed(0, 2.0).launched(1, 10.0, 3.0).committed(1, 16.0)
    assert pace.quorum_s == pytest.approx((1 - NEWEST) * 1.0 + NEWEST * 3.0)
    assert pace.sync_s == pytest.approx((1 - NEWEST) * 2.0 + NEWEST * 6.0)
    assert pace.launched_s == {0: 0.0, 1: 10.0}


def test_the_commit_of_a_step_that_an_earlier_life_began_took_no_time():
    assert Pace().committed(0, 5.0).sync_s == 0.0


def test_an_island_takes_inner_steps_by_its_speed_against_the_fastest():
    """floor(v_w / v_max H)"""
    pace = Pace().stepped("fast", 1.0).stepped("half", 2.0).stepped("third", 3.0).stepped("slow", 1000.0)
    assert {name: pace.inner_steps(name, 50) for name in pace.step_s} == {
        "fast": 50,
        "half": 25,
        "third": 16,
        "slow": 1,
    }


def test_no_island_counts_as_faster_than_so_many_times_the_median():
    """By a word of its own that it takes no time, one could leave the others a single step in a round."""
    pace = Pace().stepped("liar", 1e-300).stepped("a", 1.0).stepped("b", 2.0)
    assert pace.fastest_step_s == 1.0 / MOST_TIMES
    assert {name: pace.inner_steps(name, 100) for name in ("liar", "a", "b")} == {"liar": 100, "a": 5, "b": 2}
    assert pace.stepped("slow", 1e12).fastest_step_s == 1.0 / MOST_TIMES
    assert Pace().stepped("alone", 1e-300).inner_steps("alone", 100) == 100


def test_no_island_makes_the_others_wait_by_saying_that_it_is_slow():
    """The launch interval is H times the fastest step: as long as that one says, the run would stand."""
    assert Pace().stepped("a", 1.0).stepped("liar", 1e12).fastest_step_s == 1.0
    assert Pace().stepped("a", 1.0).stepped("b", 2.0).stepped("liar", 1e12).fastest_step_s == 1.0


def test_a_fast_island_among_slow_ones_counts_as_fast_as_it_is():
    pace = Pace().stepped("fast", 1.0).stepped("a", 10.0).stepped("b", 20.0).stepped("c", 20.0)
    assert pace.fastest_step_s == 1.0
    assert {name: pace.inner_steps(name, 100) for name in "abc"} == {"a": 10, "b": 5, "c": 5}


times = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    said=st.lists(st.tuples(st.sampled_from("abc"), times), max_size=8),
    overlap=st.integers(0, 500),
    most=st.integers(1, 500),
)
def test_whatever_islands_say_waits_and_amounts_stay_in_bounds(said: list[tuple[str, float]], overlap: int, most: int):
    pace = Pace()
    for island, step_s in said:
        pace = pace.stepped(island, step_s)
    assert 0.0 <= pace.grace_s(overlap, 0.9, 60.0) <= 60.0
    assert all(1 <= pace.inner_steps(island, most) <= most for island in "abc")
    assert not pace.step_s or most in {pace.inner_steps(island, most) for island in pace.step_s}
