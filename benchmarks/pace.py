"""How much of what the islands can do is committed when one of them is four times slower than the rest.

    python -m benchmarks.pace            in virtual time, where every inner step takes what the island's speed says
    python -m benchmarks.pace --ray      real processes on Ray, one CPU share each, the slow one sleeping

A row is a preset: committed tokens per second against the sum of the islands' own rates, each taken from the seconds
that it says it spent in its inner loop. The first and the last round are left out: in them islands start and stop.
"""

import argparse
import sys
import tempfile

from diloco_ray.api import DiLoCoTrainer
from diloco_ray.config import RunConfig
from diloco_ray.observe.events import of_kind, read_events
from diloco_ray.run import open_run
from diloco_ray.simulation.in_process import train_in_process

RECIPE = "jobs/quickstart.yaml"
SPEEDS = [1.0, 1.0, 1.0, 0.25]
# On Ray islands share the machine's cores: each sleeps so long that the cores are not what they wait for.
SPEEDS_ON_RAY = [0.2, 0.2, 0.2, 0.05]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["diloco", "eager", "async", "decoupled"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--set", dest="fields", nargs="*", default=[], metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    speeds = SPEEDS_ON_RAY if arguments.ray else SPEEDS
    where = "on Ray" if arguments.ray else "in virtual time"
    print(f"speeds {speeds}, {arguments.rounds} rounds, {where}; tokens per second")
    print(f"{'preset':<12}{'committed':>12}{'possible':>12}{'share':>8}")
    for preset in arguments.presets:
        with tempfile.TemporaryDirectory() as folder:
            committed, possible = _rates(preset, speeds, arguments.rounds, folder, arguments.ray, arguments.fields)
        print(f"{preset:<12}{committed:>12,.0f}{possible:>12,.0f}{committed / possible:>8.1%}", flush=True)
    return 0


def _rates(
    preset: str, speeds: list[float], rounds: int, folder: str, on_ray: bool, fields: list[str]
) -> tuple[float, float]:
    config = RunConfig.from_yaml(
        RECIPE,
        [
            f"sync.preset={preset}",
            f"experiment.speeds={speeds}",
            f"rounds={rounds}",
            f"evaluation.every_rounds={rounds}",
            "evaluation.sample_tokens=0",
            f"storage.path={folder}",
            *fields,
        ],
    )
    if on_ray:
        status = DiLoCoTrainer(config).fit(watch=lambda status, events: None).metrics
    else:
        coordinator = train_in_process(open_run(config))
        status = coordinator.report.status(coordinator.state)
    events = read_events(open_run(config).store)
    steady = of_kind(events, "round")[1:-1]
    committed = sum(event["tokens"] for event in steady) / sum(event["seconds"] for event in steady)
    return committed, sum(island["tokens_per_s"] for island in status["islands"])


if __name__ == "__main__":
    sys.exit(main())
