"""What `ray job submit` runs: `ray job submit --working-dir . -- python jobs/train.py jobs/quickstart.yaml`.

The same as `diloco-ray train`, with one line per round in the job's log.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a cluster that has only the job's working directory

from diloco_ray.cli.train import train_recipe, with_islands
from diloco_ray.config import RunConfig
from diloco_ray.errors import DiLoCoError

JOB_FOLDER = "working_dir_files"  # Ray unpacks a job's working directory under such a folder and may delete it later


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the run that a recipe describes, as a Ray job.")
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--name", help="the run's name (default: the recipe's)")
    parser.add_argument("--islands", choices=["ray", "external"], default="ray", help="external: all of them `join`")
    arguments = parser.parse_args()
    overrides = arguments.set + ([f"name={arguments.name}"] if arguments.name else [])
    try:
        config = RunConfig.from_yaml(arguments.recipe, overrides)
        train_recipe(with_islands(_kept(config), arguments.islands))
    except DiLoCoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _kept(config: RunConfig) -> RunConfig:
    """A relative storage path would lie in Ray's temporary copy of the working directory: it goes to the home folder,
    as Ray Train's results do."""
    path = Path(config.storage.path)
    if "://" in config.storage.path or path.is_absolute() or JOB_FOLDER not in str(Path.cwd()):
        return config
    kept = str(Path.home() / "ray_results" / path)
    return config.model_copy(update={"storage": config.storage.model_copy(update={"path": kept})})


if __name__ == "__main__":
    sys.exit(main())
