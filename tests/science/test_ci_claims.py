"""What averaging and outer momentum gain, small enough for every change: 300 warm steps, 400 steps, k = 4, H = 20.

The text is the standard library's own source, so nothing is downloaded. Over four seeds DiLoCo had 0.916 to 0.927 times
the loss of one worker and 0.955 to 0.967 times that of FedAvg; the thresholds leave room for the text of other versions
of Python. Tried by hand with seed 0, each breaks one of them at least (loss over that of one worker | of FedAvg):

    as it is 0.927 | 0.962          no momentum 0.973 | 1.010          heavy ball for Nesterov 0.982 | 1.020
    sum for mean 1.555 | 1.614             islands that keep their own parameters 0.983 | 1.021
    only the first island's contribution combined 1.046 | 1.086
"""

from pathlib import Path

import pytest

from diloco_ray import api
from diloco_ray.config import RunConfig
from diloco_ray.run import open_run
from diloco_ray.simulation.in_process import train_in_process

JOBS = Path(__file__).parents[2] / "jobs"
COMMON = ("data.corpus=stdlib", "evaluation.sample_tokens=0", "evaluation.every_rounds=100")
ROUNDS = ("inner.steps_per_round=20", "rounds=20")
FEDAVG = ("outer.optimizer=sgd", "outer.learning_rate=1")


def train(recipe: str, *fields: str) -> tuple[str, float]:
    """The run's folder, and the held-out loss of its last outer parameters."""
    config = RunConfig.from_yaml(JOBS / recipe, [*COMMON, *fields])
    coordinator = train_in_process(open_run(config))
    return config.run_url, coordinator.report.status(coordinator.state)["validation"]["last"]["loss"]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("runs")
    store = f"storage.path={folder}"
    warm, _ = train("sotu_warm_start.yaml", "name=warm", "rounds=3", store)
    start = f"model.weights={api.export(warm, f'{warm}/export')}"
    variants = {"diloco": (), "fedavg": FEDAVG, "one_worker": (*FEDAVG, "islands=1")}
    return {
        name: train("sotu_4islands_cpu.yaml", f"name={name}", store, start, *ROUNDS, *fields)[1]
        for name, fields in variants.items()
    }


def test_four_islands_learn_more_than_one_worker(losses: dict[str, float]) -> None:
    assert losses["diloco"] <= 0.96 * losses["one_worker"]


def test_outer_momentum_gains_over_plain_averaging(losses: dict[str, float]) -> None:
    assert losses["diloco"] <= 0.975 * losses["fedavg"]
