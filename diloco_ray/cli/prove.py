"""Commands that try to break a run: in virtual time, and for real."""

import contextlib
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from diloco_ray.cli.app import Name, Recipe, Set, app, read_config
from diloco_ray.errors import ConfigError, StoreError

To = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the result there too.")]


@app.command()
def simulate(
    scenario: Annotated[str, typer.Argument(help="A file, the name of one that comes along, or all.")],
    seeds: Annotated[int | None, typer.Option(min=1, help="How many stories (default: 100).")] = None,
    first_seed: Annotated[int | None, typer.Option(min=0, help="The first one's (default: 0).")] = None,
    seed: Annotated[int | None, typer.Option(help="Tell this one story, with its trace.")] = None,
    faults: Annotated[
        str | None, typer.Option(help="With --seed: numbers of its faults, such as 0,2, or none.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes (default: one per CPU).")] = None,
    to: To = None,
) -> None:
    """Play runs with seeded faults in virtual time, and hold them to every invariant. 1 where one was broken."""
    from diloco_ray.simulation.scenario import scenarios
    from diloco_ray.simulation.simulate import as_json, explain, fault_numbers, one_story, simulate, table

    many = {"--seeds": seeds, "--first-seed": first_seed, "--workers": workers}
    named, numbers = scenarios(scenario), fault_numbers(faults, seed)
    if seed is not None:
        if given := [option for option, value in many.items() if value is not None]:
            what = f"--seed {seed} with {', '.join(given)}: it tells one story, and these are of many"
            raise ConfigError(what, where="--seed", remedy=f"leave out {' and '.join(given)}, or --seed")
        _check(to)
        told = {one.name: one_story(one, seed, numbers, print) for one in named}
        ok = not any(story.problem for story in told.values())
        _write(to, {"ok": ok, "seed": seed, "scenarios": {name: as_json(story) for name, story in told.items()}})
        raise typer.Exit(not ok)
    _check(to)
    first_seed, seeds = first_seed or 0, seeds or 100
    tallies, seconds = simulate(named, range(first_seed, first_seed + seeds), workers or os.cpu_count() or 1, print)
    for line in table(tallies):
        print(line)
    num_failed = sum(len(tally.failed) for tally in tallies.values())
    print(f"{seeds:,} stories in {seconds:.0f} s, {num_failed} failed")
    explain(named, tallies, print)
    body = {"ok": not num_failed, "seconds": seconds, "stories": seeds, "first_seed": first_seed}
    _write(to, {**body, "scenarios": {name: tally.to_dict() for name, tally in tallies.items()}})
    raise typer.Exit(num_failed > 0)


@app.command()
def chaos(
    recipe: Recipe,
    set_: Set = [],  # noqa: B006
    name: Name = None,
    kills_per_hour: Annotated[float, typer.Option(min=1, help="Faults of all kinds.")] = 600,
    minutes: Annotated[float, typer.Option(min=0.1, help="How long the storm rages.")] = 15,
    seed: Annotated[int, typer.Option(min=0, help="Of the storm; the recipe has its own.")] = 1,
    to: To = None,
) -> None:
    """Storm a recipe's processes on a local Ray, and prove that the run withstood it.

    Trains three times, into folders of their own: a short pilot, whose pace says how many rounds take --minutes on a
    calm day; that many rounds in calm; and as many in the storm, which begins with the first whole round. When its
    time is over, the run goes on to its end in peace. So it all takes somewhat more than twice --minutes.
    Exit code 0 only where every invariant held, else 1.
    """
    from rich.console import Console

    from diloco_ray.runtime.chaos import run_chaos, tables

    config = read_config(recipe, set_, name)
    _check(to)
    report = run_chaos(config, kills_per_hour, minutes, seed, lambda text: print(text, flush=True))
    for part in tables(report):
        Console(soft_wrap=True, highlight=False).print(part)
    _write(to, report)
    if not report["ok"]:
        raise typer.Exit(1)


def _check(to: str | None) -> None:
    """Makes the folders of --json, and sees that a file can be written there, before anything is spent."""
    if to is None:
        return
    path = Path(to)
    try:
        with contextlib.suppress(FileExistsError):  # a file in a folder's place, which `open` has better words for
            path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        remedy = "name a file in a folder where you may write"
        raise ConfigError(f"{to} cannot be written: {error.strerror}", where="--json", remedy=remedy) from error


def _write(to: str | None, body: dict[str, Any]) -> None:
    if to is None:
        return
    try:
        Path(to).write_text(json.dumps(body, indent=2) + "\n")
    except OSError as error:
        remedy = "free the way to it before the same command is given again; the outcome is printed above"
        raise StoreError(f"{to} cannot be written: {error.strerror}", where="--json", remedy=remedy) from error
