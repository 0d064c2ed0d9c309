"""The shell's door: `diloco-ray COMMAND`. Parses, calls `api`, prints; every error ends with its own exit code.

0 done; 1 the run failed; 2 bad recipe or arguments; 3 data; 4 store; 5 damaged files; 6 fenced; 7 another run;
8 cluster; 9 a deadline ran out; 130 interrupted; 141 whoever read the output has closed it.
"""

import os
import sys

from diloco_ray.cli import train, look, outside, prove  # noqa: F401  # isort: skip  (each adds its commands)
from diloco_ray.cli.app import PIPE_CLOSED, app
from diloco_ray.errors import DiLoCoError


def main() -> None:
    """Runs the command line; known errors end in three lines and their exit code."""
    sys.path.insert(0, os.getcwd())  # where people keep the module that model.factory names
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except DiLoCoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (SystemExit, BrokenPipeError) as end:  # typer and rich end with 1 then, which would mean a failed run
        if not isinstance(end, BrokenPipeError) and not isinstance(end.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in the buffer
        sys.exit(PIPE_CLOSED)
