"""The shell's door: `diloco-ray COMMAND`. Parses, calls `api`, prints; every error ends with its own exit code.

0 done; 1 the run failed; 2 bad recipe or arguments; 3 data; 4 store; 5 damaged files; 6 fenced; 7 another run;
8 cluster; 9 a deadline ran out; 130 interrupted.
"""

import os
import sys

from diloco_ray.cli import train, look, outside, prove  # noqa: F401  # isort: skip  (each adds its commands)
from diloco_ray.cli.app import app
from diloco_ray.errors import DiLoCoError


def main() -> None:
    """Runs the command line; known errors end in three lines and their exit code."""
    sys.path.insert(0, os.getcwd())  # where people keep the module that model.factory names
    try:
        app()
    except DiLoCoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
