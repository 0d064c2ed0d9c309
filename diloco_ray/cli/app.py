"""What the commands share: the application, its arguments, its exit codes."""

import contextlib
import os
import re
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from diloco_ray import __version__
from diloco_ray.errors import ConfigError

DAMAGED, INTERRUPTED, PIPE_CLOSED = 5, 130, 141

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        print(f"diloco-ray {__version__}")
        raise typer.Exit()


@app.callback()
def _shared(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Elastic low-communication training (DiLoCo) on Ray."""


def _no_recipe(run: str) -> str:
    if run.endswith((".yaml", ".yml")):
        from diloco_ray.run import refuse_recipe

        refuse_recipe(run)
    return run


Recipe = Annotated[str, typer.Argument(help="A recipe, such as jobs/quickstart.yaml.")]
RunFolder = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's folder, such as runs/quickstart.", callback=_no_recipe)
]
Set = Annotated[
    list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Override a field: --set outer.learning_rate=0.6")
]
At = Annotated[int | None, typer.Option(help="Outer step (default: the last).")]
Name = Annotated[str | None, typer.Option("--name", help="The run's name, so its folder (default: the recipe's).")]


def read_config(recipe: str, overrides: list[str], name: str | None = None) -> Any:
    from diloco_ray.config import RunConfig

    return RunConfig.from_yaml(recipe, with_name(overrides, name))


def with_name(overrides: list[str], name: str | None) -> list[str]:
    if name is None:
        return overrides
    from diloco_ray.config import NAME

    if not re.fullmatch(NAME, name):
        remedy = "take letters, digits, '.', '_' and '-', and begin with a letter or a digit; its parent: storage.path"
        raise ConfigError(f"{name!r} is no name of a run's folder", where="--name", remedy=remedy)
    return [*overrides, f'name="{name}"']


@contextlib.contextmanager
def interruptible(then: str) -> Iterator[None]:
    """In this block SIGTERM (systemd, Slurm, `docker stop`, `ray job stop`) and a closed terminal mean what ctrl-C
    does: the command says that it was interrupted and what comes next, and ends with 130. A signal that is ignored, as
    under nohup, stays so.
    """
    if threading.current_thread() is threading.main_thread():
        for number, heard in ((signal.SIGTERM, signal.default_int_handler), (signal.SIGHUP, _hung_up)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, heard)
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted; {then}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _hung_up(*_: object) -> None:
    """Whatever is said to a terminal that is gone would be an error."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
    raise KeyboardInterrupt
