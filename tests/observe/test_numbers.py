"""The numbers that a run's events add up to."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco_ray.ids import canonical_json
from diloco_ray.observe.events import of_kind
from diloco_ray.observe.status import Statistics, Validation


def statistics_of(events: Iterable[Mapping[str, Any]]) -> Statistics:
    statistics = Statistics()
    for event in of_kind(events, "round"):
        statistics.add_round(event)
    return statistics


def validation_of(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    validation = Validation()
    for event in of_kind(events, "evaluation"):
        validation.add(event)
    return {"first": validation.first, "last": validation.last, "best": validation.best}


def round_event(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "event": "round",
        "round": number,
        "bytes_up": 100,
        "bytes_down": 30,
        "data_parallel_bytes": 5000,
        "inner_s": 2.0,
        "sync_wait_s": 0.5,
        "seconds": 1.25,
        **fields,
    }


def evaluation(outer_step: int, loss: float | None) -> dict[str, Any]:
    return {"event": "evaluation", "outer_step": outer_step, "loss": loss}


def test_a_run_without_rounds_has_sent_nothing() -> None:
    assert statistics_of([{"event": "coordinator"}]) == Statistics()


def test_rounds_add_up_and_other_events_do_not_count() -> None:
    events = [round_event(1), {"event": "decision", "text": "x"}, round_event(2, bytes_up=1, inner_s=0.25)]
    found = statistics_of(events)
    assert found == Statistics(101, 60, 10000, 2.25, 1.0, 2.5)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, 1e308, 10**400, -1, "many", [], {}])
def test_what_no_round_can_have_is_not_added(value: Any) -> None:
    """Null is what a sum without end is written as."""
    names = ("bytes_up", "bytes_down", "data_parallel_bytes", "inner_s", "sync_wait_s", "seconds")
    whole = [round_event(1), round_event(2)]
    damaged = round_event(3, **dict.fromkeys(names, value))
    assert statistics_of([*whole, damaged, {"event": "round"}]) == statistics_of(whole)


def test_before_the_first_evaluation_there_is_no_validation() -> None:
    assert validation_of([round_event(1)]) == {"first": None, "last": None, "best": None}


def test_one_evaluation_is_first_last_and_best() -> None:
    point = {"outer_step": 0, "loss": 5.5}
    assert validation_of([evaluation(0, 5.5)]) == {"first": point, "last": point, "best": point}


def test_points_are_in_the_order_of_outer_steps_whenever_they_were_measured() -> None:
    found = validation_of([evaluation(8, 2.0), evaluation(0, 5.0), evaluation(4, 1.5)])
    assert [found[name]["outer_step"] for name in ("first", "last", "best")] == [0, 8, 4]


def test_a_step_measured_again_after_a_restart_counts_once() -> None:
    found = validation_of([evaluation(4, 2.0), evaluation(4, 2.0)])
    assert found["first"] == found["last"] == {"outer_step": 4, "loss": 2.0}


@pytest.mark.parametrize("losses", [[None, 2.0, 3.0], [2.0, None, 3.0], [3.0, 2.0, None]])
def test_a_loss_that_was_not_finite_is_never_the_best(losses: list[float | None]) -> None:
    found = validation_of([evaluation(step, loss) for step, loss in enumerate(losses)])
    assert found["best"]["loss"] == 2.0
    assert (found["first"]["loss"], found["last"]["loss"]) == (losses[0], losses[-1])


def test_where_no_loss_was_finite_there_is_no_best() -> None:
    assert validation_of([evaluation(1, None), evaluation(2, None)])["best"] is None


@pytest.mark.parametrize("event", [{}, {"outer_step": "x", "loss": 1.0}, {"outer_step": None}, {"loss": 2.0}])
def test_an_evaluation_of_no_outer_step_does_not_count(event: dict[str, Any]) -> None:
    assert validation_of([{"event": "evaluation", **event}]) == validation_of([])


losses = st.none() | st.integers(0, 3).map(float) | st.sampled_from([math.nan, math.inf, -math.inf, "x"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(measured=st.lists(st.tuples(st.integers(0, 6), losses), max_size=12))
def test_the_points_that_are_kept_are_those_that_all_evaluations_together_give(measured: list[tuple[int, Any]]) -> None:
    """Of a step that was measured twice, the later loss counts."""
    is_number = {step: isinstance(loss, float) and math.isfinite(loss) for step, loss in measured}
    points = [
        {"outer_step": step, "loss": loss if is_number[step] else None} for step, loss in sorted(dict(measured).items())
    ]
    finite = [point for point in points if point["loss"] is not None]
    found = validation_of([evaluation(step, loss) for step, loss in measured])
    assert found == {
        "first": points[0] if points else None,
        "last": points[-1] if points else None,
        "best": min(finite, key=lambda point: point["loss"], default=None),
    }
    canonical_json(found)
