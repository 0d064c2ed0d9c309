"""The shell's door: `diloco-ray COMMAND`. Parses, calls `api`, prints; every error ends with its own exit code.

0 done; 1 the run failed; 2 bad recipe or arguments; 3 data; 4 store; 5 damaged files; 6 fenced; 7 another run;
8 cluster; 9 a deadline ran out; 130 interrupted.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from diloco_ray.errors import DiLoCoError

DAMAGED, INTERRUPTED = 5, 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Elastic low-communication training (DiLoCo) on Ray.",
)


def _no_recipe(run: str) -> str:
    if run.endswith((".yaml", ".yml")):
        from diloco_ray.run import refuse_recipe

        refuse_recipe(run)
    return run


Recipe = Annotated[str, typer.Argument(help="A recipe, such as jobs/quickstart.yaml.")]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="Folder, as runs/quickstart.", callback=_no_recipe)]
Set = Annotated[
    list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Override a field: --set outer.learning_rate=0.6")
]
At = Annotated[int | None, typer.Option(help="Outer step (default: the last).")]
Name = Annotated[str | None, typer.Option("--name", help="The run's name, so its folder (default: the recipe's).")]


def main() -> None:
    """Runs the command line; known errors end in three lines and their exit code."""
    sys.path.insert(0, os.getcwd())  # where people keep the module that model.factory names
    try:
        app()
    except DiLoCoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _config(recipe: str, overrides: list[str], name: str | None = None) -> Any:
    from diloco_ray.config import RunConfig

    return RunConfig.from_yaml(recipe, _overrides(overrides, name))


def _overrides(overrides: list[str], name: str | None) -> list[str]:
    return [*overrides, *([f"name={name}"] if name else [])]


@app.command()
def train(
    recipe: Recipe,
    set_: Set = [],  # noqa: B006
    name: Name = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan, as `plan` does.")] = False,
) -> None:
    """Train, or go on with, the run that a recipe describes."""
    if dry_run:
        plan(recipe, set_, name)
        return
    try:
        train_recipe(_config(recipe, set_, name))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last committed outer step", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def train_recipe(config: Any) -> None:
    from diloco_ray.api import DiLoCoTrainer
    from diloco_ray.observe.events import of_kind, read_events
    from diloco_ray.observe.progress import summary_lines
    from diloco_ray.run import read_run

    trainer = DiLoCoTrainer(config)
    trainer.open()
    print(f"run folder: {config.run_url}; meanwhile: diloco-ray status {config.run_url}", flush=True)
    result = trainer.fit()
    for line in summary_lines(result.metrics):
        print(line)
    samples = [event["sample"] for event in of_kind(read_events(read_run(result.path).store), "evaluation")]
    if samples and samples[-1]:
        print(f"\nsample:\n{samples[-1]}\n")
    folder = config.run_url
    print(f"run folder: {result.path}")
    print("next:")
    print(f"  diloco-ray verify {folder}")
    print(f"  diloco-ray sample {folder} --prompt {config.evaluation.prompt!r}")
    print(f"  diloco-ray export {folder} --to {folder}/export")


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

    report = run_chaos(_config(recipe, set_, name), kills_per_hour, minutes, seed, lambda text: print(text, flush=True))
    if as_json:
        with open(as_json, "w") as file:
            json.dump(report, file, indent=2)
    for part in tables(report):
        Console(soft_wrap=True, highlight=False).print(part)
    if not report["ok"]:
        raise typer.Exit(1)


@app.command()
def plan(
    recipe: Recipe,
    set_: Set = [],  # noqa: B006
    name: Name = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, with every field.")] = False,
) -> None:
    """Print what a recipe comes to: its preset in numbers, rounds, fragments, bytes. Nothing is prepared or started."""
    from diloco_ray.config import RunConfig, layered
    from diloco_ray.plan import plan_of, plan_parts
    from diloco_ray.presets import read_recipe

    body, overrides = read_recipe(recipe), _overrides(set_, name)
    config = RunConfig.from_dict(body, overrides, where=recipe)
    document = plan_of(config, layered(body, overrides).sources)
    if as_json:
        print(json.dumps(document, indent=2))
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    for part in plan_parts(document):
        console.print(part)


@app.command()
def prepare(recipe: Recipe, set_: Set = [], to: Annotated[str | None, typer.Option(help="Folder.")] = None) -> None:  # noqa: B006
    """Turn a recipe's corpus into packed token shards. Interrupted, the same command goes on."""
    from rich.progress import Progress

    from diloco_ray.data.prepare import prepare as prepare_data

    config = _config(recipe, set_)
    where = to or config.prepared_url
    with Progress(transient=True) as bar:
        task = bar.add_task(f"preparing {config.data.corpus}", total=None)
        manifest = prepare_data(
            config.data, where, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    for name, split in manifest.splits.items():
        print(f"{name}: {split.num_tokens:,} tokens")
        for number, group in enumerate(split.groups if len(split.groups) > 1 else ()):
            print(f"  group {number} ({group.name}): {group.num_tokens:,} tokens of {group.num_documents:,} documents")
    print(f"vocabulary {manifest.vocab_size}, tokenizer {config.data.tokenizer}, in {where}")


@app.command()
def status(run: RunFolder, as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False) -> None:
    """How a run stands, from its folder alone."""
    from diloco_ray.log.run_store import RunStore
    from diloco_ray.observe.status import read_status

    document = read_status(RunStore(run))
    if as_json:
        print(json.dumps(document, indent=2))
        return
    from rich.console import Console

    from diloco_ray.observe.progress import island_table, summary_lines

    reason = f" ({document['reason']})" if document["reason"] else ""
    print(f"{document['state']}{reason}, round {document['rounds']}/{document['num_rounds']}")
    Console(soft_wrap=True).print(island_table(document))
    for line in summary_lines(document):
        print(line)


@app.command()
def verify(run: RunFolder, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Prove a run by arithmetic: chain whole, replay bit-equal, every token accounted for."""
    from dataclasses import asdict

    from diloco_ray.document import replica_of
    from diloco_ray.log.run_store import RunStore
    from diloco_ray.log.verify import verify as verify_log
    from diloco_ray.run import read_run

    store = RunStore(run)
    if not store.list("") or not (store.exists("run.json") or store.list("log")):
        read_run(run)  # raises: there is no run at all
    report = verify_log(store, replica_of)
    if as_json:
        print(json.dumps({**asdict(report), "ok": report.ok}, indent=2))
    elif report.ok:
        print(f"run {report.run_id}: {report.num_records} records, {report.num_outer_steps} of them outer steps")
        print("chain whole")
        print(f"replay bit-equal from record {report.first_replayed} to {report.last_index}: {report.digest}")
        print(f"{report.num_snapshots} snapshots equal the replay")
        print("tokens conserved: " + ", ".join(f"{fate} {tokens:,}" for fate, tokens in report.tokens.items()))
    else:
        for problem in report.problems:
            print(f"problem: {problem}")
    if not report.ok:
        raise typer.Exit(DAMAGED)


@app.command()
def export(
    run: RunFolder,
    to: Annotated[str, typer.Option(help="Folder for the model and its tokenizer.")],
    at: At = None,
) -> None:
    """Write the outer parameters as a Hugging Face model: AutoModelForCausalLM.from_pretrained reads it."""
    from diloco_ray import api

    print(api.export(run, to, at))


@app.command()
def sample(
    run: RunFolder,
    prompt: Annotated[str, typer.Option()] = "The ",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.8,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Let the run's model continue a prompt."""
    from diloco_ray import api

    print(api.sample(run, prompt, tokens, temperature, seed))


@app.command()
def evaluate(run: RunFolder, at: At = None) -> None:
    """Measure the held-out loss of the outer parameters again, from the run's folder."""
    from diloco_ray import api

    print(f"validation loss {api.evaluate(run, at):.4f}")


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


if __name__ == "__main__":
    main()
