"""How a run shows itself: a live table on a terminal, one line per round anywhere else, and a summary at the end."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

TOLD = (
    "joined",
    "lost",
    "left",
    "quarantined",
    "rejected",
    "refused",
    "waiting",
    "alive",
    "join in time",
    "void",
    "overran",
    "taking it over",
)


def human_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def line_of(event: Mapping[str, Any], num_rounds: int) -> str:
    """One line for an event that people want to see; "" for the others."""
    match event["event"]:
        case "round":
            wait = event["sync_wait_s"] / max(event["sync_wait_s"] + event["inner_s"], 1e-9)
            return (
                f"round {event['round']}/{num_rounds}"
                f" | alive {event['alive']} contributed {event['contributed']} applied {event['applied']}"
                f" | loss {_number(event['loss'])} | {event['tokens_per_s']:,.0f} tokens/s | sync wait {wait:.1%}"
                f" | up {human_bytes(event['bytes_up'])} down {human_bytes(event['bytes_down'])}"
            )
        case "evaluation":
            return f"outer step {event['outer_step']}: validation loss {_number(event['loss'])} (outer parameters)"
        case "coordinator" if event["outer_steps"]:
            return f"coordinator (life {event['fence_epoch']}) goes on from outer step {event['outer_steps']}"
        case "decision" if any(word in event["text"] for word in TOLD) and "the run is over" not in event["text"]:
            return f"- {event['text']}"
        case _:
            return ""


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


class Progress:
    """Shows status documents and events as they come. Use as a context manager."""

    def __init__(self, num_rounds: int, *, console: Console | None = None):
        self._console = console or Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._num_rounds = num_rounds
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def __call__(self, status: Mapping[str, Any], events: list[dict[str, Any]]) -> None:
        for event in events:
            line = line_of(event, self._num_rounds)
            if line:
                self._console.print(line, markup=False)
        if self._live and status:
            self._live.update(Group(Text(self._headline(status)), island_table(status)))

    def _headline(self, status: Mapping[str, Any]) -> str:
        done, total = status["rounds"], status["num_rounds"]
        bar = "█" * (30 * done // total) + "░" * (30 - 30 * done // total)
        per_round_s = status["seconds"]["total"] / done if done else 0.0
        eta = f", about {per_round_s * (total - done):.0f} s left" if done else ""
        reason = f": {status['reason']}" if status["reason"] else ""
        return f"{status['state']}{reason}  round {done}/{total} {bar}{eta}"


def island_table(status: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("island", "state", "round", "step", "tokens/s", "pid", "node", "life", "last seen"):
        table.add_column(column, justify="left" if column in ("island", "state", "node") else "right")
    for island in status["islands"]:
        seen_s = island["last_seen_s"]
        table.add_row(
            island["name"],
            island["state"],
            str(island["round"]),
            f"{island['step']}/{island['steps']}",
            f"{island['tokens_per_s']:,.0f}",
            str(island["pid"]),
            island["node"],
            str(island["incarnation"]),
            "" if seen_s is None else f"{seen_s:.0f} s",
        )
    return table


def summary_lines(status: Mapping[str, Any]) -> list[str]:
    """What a finished run says of itself."""
    validation, sent = status["validation"], status["bytes"]
    lines = [f"{status['outer_steps']} outer steps, {status['tokens']['committed']:,} tokens committed"]
    if validation["first"]:
        first, last = validation["first"]["loss"], validation["last"]["loss"]
        ratio = f" ({last / first:.2f} x)" if first and last else ""
        lines.append(f"validation loss of the outer parameters: {_number(first)} -> {_number(last)}{ratio}")
    total = sent["up"] + sent["down"]
    if total and sent["data_parallel_equivalent"]:
        lines.append(
            f"sent {human_bytes(sent['up'])} up and {human_bytes(sent['down'])} down; data parallel (float32 gradients "
            f"up and down in every step) would have sent {human_bytes(sent['data_parallel_equivalent'])}: "
            f"{sent['data_parallel_equivalent'] / total:,.0f} times as much"
        )
    return lines
