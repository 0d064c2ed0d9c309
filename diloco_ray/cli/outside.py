"""Commands for islands that are clusters of their own: a token, and the island itself."""

import os
from typing import Annotated

import typer

from diloco_ray.cli.app import RunFolder, app, interruptible

TOKEN = "DILOCO_RAY_TOKEN"

token = typer.Typer(no_args_is_help=True, help="Tokens, by which islands from outside take part in a run.")
app.add_typer(token, name="token")

Island = Annotated[str, typer.Option("--name", metavar="ISLAND", help="The island's name, such as eu-1.")]


@token.command()
def create(
    run: RunFolder,
    name: Island,
    days: Annotated[float | None, typer.Option(min=0, help="How long it is good for (default: for ever).")] = None,
) -> None:
    """Print a new token for an island: a secret, which the island's cluster gets as DILOCO_RAY_TOKEN.

    Needs the run's DILOCO_RAY_SECRET, and that the run has begun.
    """
    from diloco_ray import api

    print(api.create_token(run, name, days))


@token.command()
def revoke(run: RunFolder, name: Island) -> None:
    """Make all tokens of an island worthless, within seconds."""
    from diloco_ray import api

    print(f"{api.revoke_tokens(run, name)} tokens of {name} are revoked")


@app.command()
def join(
    run: RunFolder,
    name: Annotated[
        str | None, typer.Option("--name", metavar="ISLAND", help="Whose token it should be (default: as it says).")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Refuse to join a run that is not of this recipe.")] = None,
    resources: Annotated[
        list[str],
        typer.Option("--resource", metavar="NAME=AMOUNT", help="Of this island on its own cluster, such as GPU=1."),
    ] = [],  # noqa: B006
    wait_s: Annotated[
        float, typer.Option(min=0, help="How long to wait for a coordinator, and then for room on this cluster.")
    ] = 600.0,
) -> None:
    """Train one island of a run whose coordinator is elsewhere: they share the run's folder, in a bucket, alone.

    The token is read from DILOCO_RAY_TOKEN. Interrupted, the island gives its work back; the same command joins again.
    """
    from diloco_ray import api
    from diloco_ray.runtime.outpost import INTERRUPTED

    with interruptible("the same command joins again"):
        why = api.join(
            run,
            os.environ.get(TOKEN, ""),
            name=name,
            recipe=recipe,
            resources=dict(_resource(text) for text in resources),
            wait_s=wait_s,
            tell=lambda text: print(text, flush=True),
        )
        if why == INTERRUPTED:
            raise KeyboardInterrupt
        print(why)


def _resource(text: str) -> tuple[str, float]:
    name, _, amount = text.partition("=")
    try:
        return name, float(amount)
    except ValueError:
        raise typer.BadParameter(f"{text!r}; give such as GPU=1", param_hint="--resource") from None
