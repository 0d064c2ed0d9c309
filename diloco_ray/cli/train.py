"""Commands that make a run, or say what it would be."""

import json
from typing import Annotated, Any

import typer

from diloco_ray.cli.app import Name, Recipe, Set, app, interruptible, read_config, with_name
from diloco_ray.errors import ConfigError

ISLANDS_HELP = "Where they are: ray (as the recipe says), or external (all are clusters of their own that `join`)."


@app.command()
def train(
    recipe: Recipe,
    set_: Set = [],  # noqa: B006
    name: Name = None,
    islands: Annotated[str, typer.Option(help=ISLANDS_HELP)] = "ray",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan, as `plan` does.")] = False,
) -> None:
    """Train, or go on with, the run that a recipe describes."""
    if dry_run:
        plan(recipe, set_, name)
        return
    train_recipe(with_islands(read_config(recipe, set_, name), islands))


def with_islands(config: Any, where: str) -> Any:
    """The recipe with all its islands on this cluster, or all from outside; as it says where neither is asked for."""
    from diloco_ray.config import RunConfig

    if where == "ray":
        return config
    if where != "external":
        number = f"; their number is a field: --set islands={where}" if where.isdecimal() else ""
        what = f"--islands {where}: it says where they are"
        raise ConfigError(what, where="--islands", remedy=f"choose ray or external{number}")
    return RunConfig.from_dict(config.model_dump(mode="json"), [f"cluster.external_islands={config.max_islands}"])


def train_recipe(config: Any) -> None:
    from diloco_ray.api import DiLoCoTrainer
    from diloco_ray.observe.events import of_kind, read_events
    from diloco_ray.observe.progress import summary_lines
    from diloco_ray.run import read_run

    with interruptible("the same command goes on from the last committed outer step"):
        trainer = DiLoCoTrainer(config)
        trainer.open()
        print(f"run folder: {config.run_url}; meanwhile: diloco-ray status {config.run_url}", flush=True)
        if config.cluster.external_islands:
            print(
                f"each island from outside needs a token: diloco-ray token create {config.run_url} --name NAME",
                flush=True,
            )
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

    body, overrides = read_recipe(recipe), with_name(set_, name)
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
    from rich.console import Console
    from rich.progress import Progress

    from diloco_ray.data.prepare import prepare as prepare_data

    config = read_config(recipe, set_)
    where = to or config.prepared_url
    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"preparing {config.data.corpus}", total=None)
        manifest = prepare_data(
            config.data, where, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    for name, split in manifest.splits.items():
        print(f"{name}: {split.num_tokens:,} tokens")
        for number, group in enumerate(split.groups if len(split.groups) > 1 else ()):
            print(f"  group {number} ({group.name}): {group.num_tokens:,} tokens of {group.num_documents:,} documents")
    print(f"vocabulary {manifest.vocab_size}, tokenizer {config.data.tokenizer}, in {where}")
