"""What people see: one line for what matters, none for the rest."""

import io
from typing import Any

import pytest
from rich.console import Console

from diloco_ray.observe.progress import Progress, human_bytes, line_of, summary_lines

ROUND: dict[str, Any] = {
    "event": "round",
    "round": 3,
    "alive": 4,
    "contributed": 3,
    "applied": 2,
    "loss": 2.34567,
    "tokens_per_s": 12345.6,
    "inner_s": 9.0,
    "sync_wait_s": 1.0,
    "bytes_up": 1_500_000,
    "bytes_down": 999,
}
STATUS: dict[str, Any] = {
    "state": "training",
    "reason": "",
    "rounds": 2,
    "num_rounds": 8,
    "outer_steps": 2,
    "islands": [
        {
            "name": "island-00",
            "state": "alive",
            "round": 3,
            "step": 4,
            "steps": 6,
            "tokens_per_s": 1234.5,
            "pid": 4711,
            "node": "10.0.0.1",
            "incarnation": 2,
            "last_seen_s": None,
        }
    ],
    "tokens": {"committed": 1_234_567},
    "validation": {
        "first": {"outer_step": 0, "loss": 4.0},
        "last": {"outer_step": 8, "loss": 1.0},
        "best": {"outer_step": 8, "loss": 1.0},
    },
    "bytes": {"up": 1000, "down": 1000, "data_parallel_equivalent": 400_000},
    "seconds": {"total": 3.0},
}


def console(is_terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    terminal = {"TERM": "xterm"}  # not that of whoever runs the tests
    return Console(
        file=out, force_terminal=is_terminal, width=120, soft_wrap=True, highlight=False, _environ=terminal
    ), out


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_500_000, "1.5 MB"),
        (2_000_000_000, "2.0 GB"),
        (3e12, "3.0 TB"),
        (4e15, "4000.0 TB"),
    ],
)
def test_bytes_are_told_in_units_of_a_thousand(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_a_round_is_one_line_with_all_that_is_asked_for() -> None:
    assert line_of(ROUND, 8) == (
        "round 3/8 | alive 4 contributed 3 applied 2 | loss 2.3457 | 12,346 tokens/s | sync wait 10.0%"
        " | up 1.5 MB down 999 B"
    )


def test_a_round_without_a_finite_loss_or_any_time_is_a_line_as_well() -> None:
    line = line_of({**ROUND, "loss": None, "inner_s": 0.0, "sync_wait_s": 0.0}, 8)
    assert "loss not finite" in line
    assert "sync wait 0.0%" in line


def test_an_evaluation_names_its_outer_step() -> None:
    event = {"event": "evaluation", "outer_step": 6, "loss": 1.5, "sample": "x"}
    assert line_of(event, 8) == "outer step 6: validation loss 1.5000 (outer parameters)"


def test_a_coordinator_is_told_of_when_it_goes_on_and_not_when_it_begins() -> None:
    assert line_of({"event": "coordinator", "fence_epoch": 1, "outer_steps": 0}, 8) == ""
    assert line_of({"event": "coordinator", "fence_epoch": 2, "outer_steps": 5}, 8).endswith("from outer step 5")


@pytest.mark.parametrize(
    ("text", "is_told"),
    [
        ("island-01 joined (incarnation 2, pid 7 on here)", True),
        ("island-01 lost: silent for 60 s", True),
        ("1 of at least 2 islands alive; waiting up to 100 s", True),
        ("island-01: contribution rejected (strike 1): values", True),
        ("2 of 3 in; island-02 overran 10 s", True),
        ("round 3: island-00, island-01 at work", False),
    ],
)
def test_decisions_that_change_who_takes_part_are_told(text: str, is_told: bool) -> None:
    assert line_of({"event": "decision", "text": text}, 8) == (f"- {text}" if is_told else "")


def test_events_of_an_unknown_kind_are_passed_over() -> None:
    assert line_of({"event": "of a later version"}, 8) == ""


def test_without_a_terminal_there_are_lines_and_nothing_else() -> None:
    where, out = console(is_terminal=False)
    with Progress(8, console=where) as progress:
        progress(STATUS, [ROUND, {"event": "outer_step"}])
        progress(STATUS, [])
    assert out.getvalue() == line_of(ROUND, 8) + "\n"


def test_text_in_brackets_is_text_and_no_markup() -> None:
    where, out = console(is_terminal=False)
    with Progress(8, console=where) as progress:
        progress(STATUS, [{"event": "decision", "text": "island-00 lost: [red]ValueError[/red]"}])
    assert "[red]ValueError[/red]" in out.getvalue()


def test_on_a_terminal_there_is_a_table_of_the_islands_too() -> None:
    where, out = console(is_terminal=True)
    with Progress(8, console=where) as progress:
        progress(STATUS, [ROUND])
        progress({}, [])
    shown = out.getvalue()
    assert line_of(ROUND, 8) in shown
    for text in ("round 2/8", "island-00", "4/6", "4711", "about 9 s left"):
        assert text in shown


def test_the_summary_compares_what_was_sent_with_data_parallel() -> None:
    lines = summary_lines(STATUS)
    assert lines[0] == "2 outer steps, 1,234,567 tokens committed"
    assert lines[1].endswith("4.0000 -> 1.0000 (0.25 x)")
    assert "1.0 kB up and 1.0 kB down" in lines[2]
    assert lines[2].endswith("would have sent 400.0 kB: 200 times as much")


def test_a_run_that_ended_before_anything_was_sent_has_a_summary() -> None:
    nothing = {
        **STATUS,
        "validation": {"first": None, "last": None, "best": None},
        "bytes": {"up": 0, "down": 0, "data_parallel_equivalent": 0},
    }
    assert len(summary_lines(nothing)) == 1


def test_a_summary_of_a_diverged_run_says_so() -> None:
    last = {"outer_step": 8, "loss": None}
    lines = summary_lines({**STATUS, "validation": {**STATUS["validation"], "last": last}})
    assert lines[1].endswith("4.0000 -> not finite")
