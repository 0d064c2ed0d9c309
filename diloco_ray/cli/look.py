"""Commands on a run's folder: how it stands, whether it is sound, and the model in it."""

import json
from typing import Annotated, Any

import typer

from diloco_ray.cli.app import DAMAGED, At, RunFolder, app

MOST_PROBLEMS = 50  # that `verify` prints


@app.command()
def status(run: RunFolder, as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False) -> None:
    """How a run stands, from its folder alone; of a folder of runs, each of them."""
    from diloco_ray.log.run_store import RunStore
    from diloco_ray.observe.status import STATUS, read_status

    store = RunStore(run)
    if not store.exists(STATUS) and (runs := [name for name in store.list() if store.exists(f"{name}/{STATUS}")]):
        documents = {name: read_status(RunStore(store.url_of(name))) for name in runs}
        if as_json:
            print(json.dumps(documents, indent=2))
        for name, document in () if as_json else documents.items():
            print(f"{run.rstrip('/')}/{name}: {_headline(document)}")
        return
    document = read_status(store)
    if as_json:
        print(json.dumps(document, indent=2))
        return
    from rich.console import Console

    from diloco_ray.observe.progress import island_table, summary_lines

    print(_headline(document))
    Console(soft_wrap=True).print(island_table(document))
    for line in summary_lines(document):
        print(line)


def _headline(document: dict[str, Any]) -> str:
    reason = f" ({document['reason']})" if document["reason"] else ""
    return f"{document['state']}{reason}, round {document['rounds']}/{document['num_rounds']}"


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
        for problem in report.problems[:MOST_PROBLEMS]:
            print(f"problem: {problem}")
        if (more := len(report.problems) - MOST_PROBLEMS) > 0:
            print(f"and {more:,} more; --json lists them all")
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
def doctor(
    storage: Annotated[str, typer.Option(help="Where runs are to lie.")] = "runs",
    wan: Annotated[bool, typer.Option("--wan", help="Print what nodes of one stretched Ray cluster need.")] = False,
) -> None:
    """Look at this machine and its storage before a run. 1 where something is wrong; each finding has its remedy."""
    from diloco_ray.doctor import WAN, examine

    if wan:
        for name, value in WAN.items():
            print(f"export {name}={value}")
        return
    is_well = True
    for finding in examine(storage):
        print(f"{'ok  ' if not finding.remedy else 'BAD '} {finding.subject}: {finding.what}")
        if finding.remedy:
            is_well = False
            print(f"       what to do: {finding.remedy}")
    raise typer.Exit(not is_well)
