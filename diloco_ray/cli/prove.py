"""Commands that try to break a run: in virtual time, and for real."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from diloco_ray.cli.app import Name, Recipe, Set, app, read_config


@app.command()
def simulate(
    scenario: Annotated[str, typer.Argument(help="A file, the name of one that comes along, or all.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many stories.")] = 100,
    first_seed: Annotated[int, typer.Option(min=0)] = 0,
    seed: Annotated[int | None, typer.Option(help="Tell this one story, with its trace.")] = None,
    faults: Annotated[
        str | None, typer.Option(help="With --seed: numbers of its faults, such as 0,2, or none.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes (default: one per CPU).")] = None,
    to: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the result there too.")] = None,
) -> None:
    """Play runs with seeded faults in virtual time, and hold them to every invariant. 1 where one was broken."""
    from diloco_ray.simulation.scenario import scenarios
    from diloco_ray.simulation.simulate import explain, fault_numbers, one_story, simulate, table

    named, numbers = scenarios(scenario), fault_numbers(faults, seed)
    if seed is not None:
        told = [one_story(one, seed, numbers, print) for one in named]
        raise typer.Exit(any(story.problem for story in told))
    tallies, seconds = simulate(named, range(first_seed, first_seed + seeds), workers or os.cpu_count() or 1, print)
    for line in table(tallies):
        print(line)
    num_failed = sum(len(tally.failed) for tally in tallies.values())
    print(f"{seeds:,} stories in {seconds:.0f} s, {num_failed} failed")
    explain(named, tallies, print)
    if to:
        body = {"ok": not num_failed, "seconds": seconds, "stories": seeds, "first_seed": first_seed}
        body["scenarios"] = {name: tally.to_dict() for name, tally in tallies.items()}
        Path(to).write_text(json.dumps(body, indent=2) + "\n")
    raise typer.Exit(num_failed > 0)


@app.command()
def chaos(
    recipe: Recipe,
    set_: Set = [],  # noqa: B006
    name: Name = None,
    kills_per_hour: Annotated[float, typer.Option(min=1, help="Faults of all kinds.")] = 600,
    minutes: Annotated[float, typer.Option(min=0.1, help="How long the storm rages.")] = 15,
    seed: Annotated[int, typer.Option(min=0, help="Of the storm; the recipe has its own.")] = 1,
    as_json: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the report there.")] = None,
) -> None:
    """Storm a recipe's processes on a local Ray, and prove that the run withstood it.

    Trains three times, into folders of their own: a short pilot, whose pace says how many rounds take --minutes on a
    calm day; that many rounds in calm; and as many in the storm, which begins with the first whole round. When its
    time is over, the run goes on to its end in peace. So it all takes somewhat more than twice --minutes.
    Exit code 0 only where every invariant held, else 1.
    """
    from rich.console import Console

    from diloco_ray.runtime.chaos import run_chaos, tables

    report = run_chaos(
        read_config(recipe, set_, name), kills_per_hour, minutes, seed, lambda text: print(text, flush=True)
    )
    if as_json:
        with open(as_json, "w") as file:
            json.dump(report, file, indent=2)
    for part in tables(report):
        Console(soft_wrap=True, highlight=False).print(part)
    if not report["ok"]:
        raise typer.Exit(1)
