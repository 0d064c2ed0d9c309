"""What all rooms' tests share: a corpus made here, a tiny recipe, and no network."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: test processes share the cores
# A shell's background jobs ignore Ctrl-C, and so would every process that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

TEXT = "the a one outer inner step island moves far from its base and comes back with news of what it saw"


Show = Callable[[str], None]


@pytest.fixture
def show(record_property: Callable[[str, object], None]) -> Show:
    """Has a line printed below the tests' result."""
    return lambda line: record_property("shown", line)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for report in terminalreporter.getreports("passed"):
        for name, line in report.user_properties:
            if name == "shown":
                terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 2,000 seeded sentences."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n".join(" ".join(rng.choices(TEXT.split(), k=12)) + "." for _ in range(2000)))
    return path


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe as a mapping: three islands, a model of some 20,000 parameters, seconds on one core."""
    return {
        "name": "tiny",
        "seed": 7,
        "islands": 3,
        "rounds": 4,
        "data": {"corpus": str(corpus), "sequence_length": 32, "validation_fraction": 0.05},
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "max_position_embeddings": 64,
                "tie_word_embeddings": True,
            }
        },
        "inner": {"steps_per_round": 6, "batch_size": 4, "learning_rate": 3e-3},
        "evaluation": {"every_rounds": 2, "num_sequences": 16, "sample_tokens": 0},
        "storage": {"path": str(tmp_path / "runs"), "snapshot_every_rounds": 2},
        "cluster": {"island_resources": {"CPU": 0.25}},
    }


class Pace:
    """How long an inner step of a run takes at least, until the test has shown what it wants to show."""

    def __init__(self, path: Path):
        self._path = path

    def slow_down(self, seconds: float) -> None:
        """From now on. Written at once: a reader never finds half a number."""
        fresh = self._path.with_suffix(".new")
        fresh.write_text(str(seconds))
        fresh.replace(self._path)

    def let_go(self) -> None:
        self._path.unlink()


@pytest.fixture
def pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pace:
    """Of all processes that are started after it and train a `paced` recipe."""
    from tests.model.paced_module import PACE  # imports torch

    monkeypatch.setenv(PACE, str(tmp_path / "pace"))
    return Pace(tmp_path / "pace")


@pytest.fixture
def paced(tiny: dict[str, Any]) -> dict[str, Any]:
    """Three islands of a model that is light to start and as slow as `pace` says."""
    return {**tiny, "name": "paced", "model": {"factory": "tests.model.paced_module:build"}}


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """The URL of a bucket of a moto server."""
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("test-bucket")
        yield "s3://test-bucket"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
