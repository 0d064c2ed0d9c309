"""An island from outside is told what is wrong with its token or its recipe before it costs anybody anything."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from diloco_ray import api
from diloco_ray.cli import main
from diloco_ray.config import RunConfig
from diloco_ray.errors import DeadlineError, RunMismatchError
from diloco_ray.run import Run, open_run
from diloco_ray.runtime import outpost
from diloco_ray.simulation.in_process import begin
from diloco_ray.transport.letters import NOTICE, Token
from diloco_ray.transport.tokens import create_token, revoke_tokens
from tests.mail import SECRET, office_of, office_open
from tests.processes import write_recipe


class RayStartedError(Exception):
    """In place of a Ray: whoever comes so far has been believed."""


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise RayStartedError

    monkeypatch.setattr(ray, "init", start)


def run_of(body: dict[str, Any], **sync: float) -> Run:
    quick = {"poll_s": 0.05, **sync}
    return open_run(RunConfig.from_dict({**body, "sync": quick, "cluster": {"external_islands": 3}}))


def token_of(run: Run, secret: str = SECRET, days: float | None = None) -> Token:
    return create_token(run.store, run.run_id, secret, "eu-1", days)


@contextmanager
def coordinator_of(run: Run) -> Iterator[list[str]]:
    """One that lives, and believes tokens of SECRET; yields what it notes."""
    with office_open(run.store, begin(run), run.coordinator_job(), run.config.model_dump(mode="json")) as notes:
        yield notes


def revoked(run: Run) -> Token:
    token = token_of(run)
    revoke_tokens(run.store, "eu-1")
    return token


def of_another_run(run: Run) -> Token:
    """With the same secret."""
    body = run.config.model_dump(mode="json")
    return token_of(open_run(RunConfig.from_dict({**body, "name": "another"})))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda run: token_of(run, "a secret of somebody else"), "signature: not of this island's token, run and file"),
        (lambda run: token_of(run, days=-1.0), "token: it has expired"),
        (revoked, "token: it has been revoked"),
        (of_another_run, "token: this run has not given it out"),
    ],
    ids=["another secret", "expired", "revoked", "another run"],
)
def test_a_token_that_does_not_hold_is_refused_before_a_ray_is_there(
    make: Callable[[Run], Token], reason: str, tiny: dict[str, Any]
) -> None:
    run = run_of(tiny)
    with coordinator_of(run), pytest.raises(RunMismatchError) as caught:
        api.join(run.store.url, make(run).text)
    assert caught.value.what == f"the coordinator refuses this island: {reason}"
    assert "diloco-ray token create" in caught.value.remedy


def test_a_token_that_holds_is_believed(tiny: dict[str, Any]) -> None:
    run = run_of(tiny)
    with coordinator_of(run) as notes, pytest.raises(RayStartedError):
        api.join(run.store.url, token_of(run).text)
    assert notes == []


def test_a_coordinator_that_is_away_is_waited_for_by_name(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outpost, "TOLD_EVERY_S", 0.2)
    run, told, is_told = run_of(tiny, coordinator_timeout_s=30.0), list[str](), threading.Event()
    office_of(run.store, begin(run), run.coordinator_job(), [], run.config.model_dump(mode="json"))

    def tell(text: str) -> None:
        told.append(text)
        is_told.set()

    def join() -> None:
        with pytest.raises(RayStartedError):
            api.join(run.store.url, token_of(run).text, tell=tell)

    island = threading.Thread(target=join, daemon=True)
    island.start()
    assert is_told.wait(20)
    with coordinator_of(run):  # the next one
        island.join(20)
        assert not island.is_alive()
    assert told == ["the coordinator did not answer 'measured' for 0.2 s; waiting up to 30 s"]


def test_a_coordinator_that_stays_away_is_given_up_without_a_ray(tiny: dict[str, Any]) -> None:
    run, told = run_of(tiny, coordinator_timeout_s=0.3), list[str]()
    office_of(run.store, begin(run), run.coordinator_job(), [], run.config.model_dump(mode="json"))
    with pytest.raises(DeadlineError, match=r"the coordinator did not answer 'measured' for 0\.3 s") as caught:
        api.join(run.store.url, token_of(run).text, tell=told.append)
    assert "look whether its command still runs" in caught.value.remedy
    assert len(told) == 1


def test_a_run_of_another_recipe_is_refused_with_each_field_and_with_what_an_island_can_do(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tiny)
    mine = write_recipe(tmp_path, {**tiny, "name": "mine", "rounds": 99, "outer": {"learning_rate": 0.1}, "seed": 8})
    monkeypatch.setenv("DILOCO_RAY_TOKEN", token_of(run).text)
    monkeypatch.setattr(sys, "argv", ["diloco-ray", "join", run.store.url, "--recipe", str(mine)])
    with coordinator_of(run), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == RunMismatchError.exit_code == 7
    assert capsys.readouterr().err.splitlines() == [
        "error: this folder holds a run with another recipe:",
        "    outer.learning_rate: 0.7 -> 0.1",
        "    seed: 7 -> 8",
        f"  where: {run.store.url}",
        "  what to do: this is not the run of your recipe: compare its address, or leave --recipe out and train by the "
        "run's",
    ]


def test_a_notice_that_names_another_recipe_than_the_runs_is_refused_field_by_field(tiny: dict[str, Any]) -> None:
    """Somebody else has written into the run's folder: an island must not train by that."""
    run = run_of(tiny)
    foreign = {**run.config.model_dump(mode="json"), "seed": 8}
    office_of(run.store, begin(run), run.coordinator_job(), [], foreign)
    with pytest.raises(RunMismatchError, match=r"another recipe:\n    seed: 7 -> 8\n  where") as caught:
        api.join(run.store.url, token_of(run).text)
    assert caught.value.where == run.store.url_of(NOTICE)
    assert "look who else writes to this folder" in caught.value.remedy
