"""The numbers that a run's events add up to."""

from typing import Any

import pytest

from diloco_ray.observe.status import Statistics, statistics_of, validation_of


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


def test_sums_rebuilt_from_events_are_the_sums_that_were_kept() -> None:
    events = [round_event(number, seconds=number / 4) for number in range(1, 6)]
    kept = Statistics()
    for event in events:
        kept.add_round(event)
    assert statistics_of(events) == kept


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
