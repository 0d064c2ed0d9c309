"""What is printed and written: the table of claims, the runs behind it, and the curves."""

import os
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.science.claims import Finding, Row
from benchmarks.science.runs import Outcomes
from benchmarks.science.variants import VARIANTS

CURVES = ("one worker", "data parallel", "DiLoCo")
H_SWEEP = {25: "DiLoCo", 100: "H = 100", 200: "H = 200"}
K_SWEEP = {1: "one worker", 2: "k = 2", 4: "DiLoCo", 8: "k = 8", 16: "k = 16"}

Findings = list[tuple[Row, Finding | None]]  # None: skipped, the corpus has no labels

REMARKS = """\
* Observed: held-out loss (nats per token) of the last outer parameters over that of the other variant, minus one, by
  pairs of equal seeds; mean, and least to most over the seeds. Under 0.3 % either way is a tie. Thresholds are held
  against the mean.
* Accounting of DiLoCo '23: every variant takes the same inner steps, and each island brings data of its own. So k
  islands see k times the tokens of one worker, and data parallel (one worker with the batch of four) sees 4 times.
* One learning rate for all, tuned for none: part of what averaging gains, a lower rate or a larger batch would too.
* Fewer bytes: than float32 gradients up and down in every inner step, which is what data parallel would send.
* "Not claimed at this size": the papers see it in models a thousand times larger, a toy does not; what is seen stands
  there all the same.
"""


def table(findings: Findings) -> str:
    lines = ["| row | claim | observed | threshold | verdict | the paper |", "|---|---|---|---|---|---|"]
    for row, finding in findings:
        if finding is None:
            lines.append(f"| {row.name} | | | | skipped: needs --label-column | {row.paper} |")
            continue
        claim = finding.claim
        what = f"{claim.of} against {claim.against}"
        verdict = f"**{finding.verdict}**" if finding.fails else finding.verdict
        if not claim.asserted and claim.claimed:
            verdict += " (shown only)"
        lines.append(f"| {row.name} | {what} | {finding.observed} | {claim.threshold} | {verdict} | {row.paper} |")
    return "\n".join(lines)


def runs_table(outcomes: Outcomes) -> str:
    lines = ["| variant | differs in | held-out loss by seed | million tokens | fewer bytes |", "|---|---|---|---|---|"]
    for name, seeds in outcomes.items():
        variant, first = VARIANTS[name], seeds[0]
        fields = ", ".join(f"`{field}`" for field in variant.fields)
        fields += "a process per island" * variant.on_ray + " no warm start" * variant.from_scratch
        fewer = f"{first.fewer_bytes:.0f} x" if first.fewer_bytes else ""
        losses = ", ".join(f"{outcome.loss:.4f}" for outcome in seeds)
        lines.append(f"| {name} | {fields} | {losses} | {first.tokens[-1] / 1e6:.2f} | {fewer} |")
    return "\n".join(lines)


def write_page(to: Path, command: str, findings: Findings, outcomes: Outcomes) -> None:
    """The page, and its figure beside it where the curves' variants were run."""
    to.parent.mkdir(parents=True, exist_ok=True)
    figure = ""
    if all(name in outcomes for name in CURVES):
        draw(outcomes, to.with_suffix(".svg"))
        figure = f"![Loss against tokens, H and the number of islands]({to.stem}.svg)\n\n"
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}, {platform.system()})"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    to.write_text(
        "# The papers' claims at toy size\n\n"
        f"* Date: {date.today().isoformat()}. Machine: {machine}; {versions}. {_duration(outcomes)}.\n"
        f"* Command: `{command}`.\n"
        "* Model and setting: `jobs/sotu_4islands_cpu.yaml` after `jobs/sotu_warm_start.yaml`; what a variant changes\n"
        "  is in the second table.\n\n"
        f"{table(findings)}\n\n{figure}{REMARKS}\n## The runs\n\n{runs_table(outcomes)}\n",
        encoding="utf-8",
    )


def _duration(outcomes: Outcomes) -> str:
    """Of the runs, whenever they were made."""
    runs = [outcome for seeds in outcomes.values() for outcome in seeds]
    return f"{len(runs)} runs of {sum(run.seconds for run in runs) / 60:.0f} minutes in all"


def draw(outcomes: Outcomes, to: Path) -> None:
    """Three panels: loss against tokens; final loss against H and against k. Means over the seeds, least to most."""
    matplotlib.rcParams.update({"svg.hashsalt": "diloco_ray", "svg.fonttype": "none", "axes.grid": True})
    figure = Figure(figsize=(13, 4), layout="constrained")
    curves, by_h, by_k = figure.subplots(1, 3)
    for name in CURVES:
        seeds = outcomes[name]
        tokens = [count / 1e6 for count in seeds[0].tokens]
        columns = list(zip(*(outcome.losses for outcome in seeds)))
        _line(curves, tokens, columns, name)
    curves.set(xlabel="million tokens since the warm start", ylabel="held-out loss")
    curves.legend()
    for axes, sweep, label in ((by_h, H_SWEEP, "H, inner steps per round"), (by_k, K_SWEEP, "islands")):
        there = {number: outcomes[name] for number, name in sweep.items() if name in outcomes}
        _line(axes, list(there), [[outcome.loss for outcome in seeds] for seeds in there.values()], "DiLoCo")
        axes.set(xscale="log", xlabel=label)
        axes.set_xticks(list(there), [str(number) for number in there])
        axes.minorticks_off()
    worker = [outcome.loss for outcome in outcomes["one worker"]]
    by_h.axhline(sum(worker) / len(worker), linestyle="--", color="gray", label="one worker")
    by_h.legend()
    figure.savefig(to, metadata={"Date": None})


def _line(axes: Axes, x: Sequence[float], columns: Sequence[Sequence[float]], label: str) -> None:
    axes.plot(x, [sum(column) / len(column) for column in columns], marker="o", markersize=3, label=label)
    axes.fill_between(x, [min(column) for column in columns], [max(column) for column in columns], alpha=0.2)
