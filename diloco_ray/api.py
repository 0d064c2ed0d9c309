"""The Python door: `DiLoCoTrainer(config).fit()`, in the shapes of Ray Train."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from diloco_ray.algorithm.replica import Replica
from diloco_ray.config import RunConfig
from diloco_ray.data.shards import TokenShards
from diloco_ray.data.tokenizers import load_tokenizer
from diloco_ray.document import replica_of
from diloco_ray.errors import ConfigError, CorruptionError, DiLoCoError
from diloco_ray.island.evaluator import validation_batches
from diloco_ray.log.run_log import RunLog
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.snapshot import restore
from diloco_ray.model.build import build_model, trainable_parameters
from diloco_ray.model.export import export_model, sample_text, validation_loss
from diloco_ray.observe.events import of_kind, read_events
from diloco_ray.observe.progress import Progress
from diloco_ray.run import Run, check_same_recipe, open_as_island, open_run, read_run
from diloco_ray.runtime.cluster import connected
from diloco_ray.runtime.driver import train_on_ray
from diloco_ray.runtime.outpost import check_token, join_on_ray
from diloco_ray.transport import tokens
from diloco_ray.transport.letters import MAIL, Token, mark_of
from diloco_ray.transport.run_store import read_notice

SECRET, LEAST_SECRET = "DILOCO_RAY_SECRET", 16

Watcher = Callable[[Mapping[str, Any], list[dict[str, Any]]], None]


@dataclass(frozen=True)
class Result:
    """What `fit` returns. path: the run's folder. metrics: the last status document, with `loss` the last validation
    loss. error: the error that ended the run early, where `fit(raise_on_error=False)` was asked for."""

    path: str
    metrics: Mapping[str, Any]
    error: DiLoCoError | None = None

    @property
    def metrics_dataframe(self) -> pd.DataFrame:
        """One row per round; `validation_loss` where the outer parameters were measured."""
        run = read_run(self.path)
        events = read_events(run.store)
        rounds = pd.DataFrame(of_kind(events, "round")).drop(columns="event", errors="ignore")
        measured = {event["round"]: event["loss"] for event in of_kind(events, "evaluation")}
        if not rounds.empty:
            rounds = rounds.drop_duplicates("round", keep="last").reset_index(drop=True)
            rounds["validation_loss"] = [measured.get(round) for round in rounds["round"]]
        return rounds

    def model(self, at: int | None = None) -> nn.Module:
        """The trained model, with the outer parameters of the last outer step, or of outer step `at`."""
        return load_model(read_run(self.path), at)


class DiLoCoTrainer:
    """One run of DiLoCo on Ray: islands, a coordinator and an evaluator, from a recipe.

    The same recipe again takes the run up from its last committed outer step.
    """

    def __init__(self, config: RunConfig | Mapping[str, Any] | str | Path):
        """config: a recipe, or the path of one."""
        if isinstance(config, str | Path):
            config = RunConfig.from_yaml(config)
        self.config = config if isinstance(config, RunConfig) else RunConfig.from_dict(config)

    def fit(self, *, watch: Watcher | None = None, raise_on_error: bool = True) -> Result:
        """Trains to the end and returns the result. watch: gets status documents and new events instead of the console.

        Uses the Ray this process is connected to, else RAY_ADDRESS or `cluster.address`, else starts a local one.
        """
        try:
            run = self.open()
            status = finished_status(run) or self._train(run, watch)
        except DiLoCoError as error:
            if raise_on_error:
                raise
            return Result(self.config.run_url, {}, error)
        last = status["validation"]["last"]
        return Result(run.store.url, {**status, "loss": last["loss"] if last else None})

    def open(self) -> Run:
        """Prepares the data and begins or takes up the run's folder: all that can be refused is refused here."""
        if self.config.cluster.external_islands:
            secret_of_environment()
        return open_run(self.config)

    def _train(self, run: Run, watch: Watcher | None) -> dict[str, Any]:
        secret = secret_of_environment() if self.config.cluster.external_islands else ""
        with connected(self.config.cluster.address):
            if watch is not None:
                return train_on_ray(run, watch, secret)
            with Progress(self.config.rounds) as progress:
                return train_on_ray(run, progress, secret)


# ---- what can be done with a run's folder ----


def load_model(run: Run, at: int | None = None) -> nn.Module:
    """The run's model with the outer parameters of outer step `at` (default: the last)."""
    shards = TokenShards.open(run.prepared_url)
    model = build_model(
        run.config.model,
        seed=run.config.seed,
        vocab_size=shards.manifest.vocab_size,
        eos_token_id=shards.manifest.eos_token_id,
    )
    load_replica(run, at).write_to_(trainable_parameters(model))
    return model.eval()


def finished_status(run: Run) -> dict[str, Any] | None:
    """The last status of a run that has nothing left to do: measured to its end, and no island waits for word of it."""
    if not run.store.exists("status.json"):
        return None
    try:
        status = json.loads(run.store.read("status.json"))
    except ValueError:
        return None
    index = RunLog.open(run.store).tail.index
    measured = (status["validation"]["last"] or {}).get("outer_step") == index
    done = status["state"] == "succeeded" and status["outer_steps"] == index and status["rounds"] == run.config.rounds
    return status if done and measured and _all_know(run) else None


def _all_know(run: Run) -> bool:
    """Whether islands from outside, if there may be any, have been told that the run is over."""
    if not run.config.cluster.external_islands:
        return True
    try:
        notice = read_notice(run.store)
    except CorruptionError:  # whoever takes the run up writes another
        return False
    return notice is None or notice.state == "succeeded"


def load_replica(run: Run, at: int | None = None) -> Replica:
    replica = replica_of(run.document)
    log = RunLog.open(run.store)
    if at is not None and not 0 <= at <= log.tail.index:
        raise ConfigError(
            f"outer step {at} is not in the log", where=run.store.url, remedy=f"choose 0 to {log.tail.index}"
        )
    restore(run.store, log, replica, at)
    return replica


def export(path: str, to: str, at: int | None = None) -> str:
    """Writes the model and its tokenizer as `save_pretrained` does; returns where."""
    run = read_run(path)
    tokenizer_path = TokenShards.open(run.prepared_url).tokenizer_path
    outer_step = RunLog.open(run.store).tail.index if at is None else at
    origin = {"run_id": run.run_id, "outer_step": outer_step, "recipe": run.document["config"]}
    return export_model(load_model(run, at), tokenizer_path, to, origin)


def evaluate(path: str, at: int | None = None) -> float:
    """Held-out loss of the outer parameters, on the sequences that the run measures on."""
    run = read_run(path)
    settings = run.config.evaluation
    shards = TokenShards.open(run.prepared_url)
    batches = validation_batches(shards, run.config.data.sequence_length, settings.num_sequences, settings.batch_size)
    return validation_loss(load_model(run, at), batches)


def sample(path: str, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
    """Text that the run's model continues the prompt with."""
    run = read_run(path)
    tokenizer = load_tokenizer(TokenShards.open(run.prepared_url).tokenizer_path)
    return sample_text(
        load_model(run), tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )


# ---- islands from outside ----


def secret_of_environment(remedy: str = "") -> str:
    """What all tokens of a run are made of. ConfigError where there is none, or a short one."""
    secret = os.environ.get(SECRET, "")
    if len(secret) < LEAST_SECRET:
        what = f"has {len(secret)} characters, which is too few" if secret else "is not set"
        raise ConfigError(
            f"{SECRET} {what}: the tokens of islands from outside are made of it",
            where="the environment",
            remedy=remedy or f"export {SECRET}=$(openssl rand -hex 32), and keep it: a run goes on with the same one",
        )
    return secret


def create_token(path: str, island: str, days: float | None = None) -> str:
    """A new token for an island of this run: a secret."""
    run = read_run(path)
    remedy = f"export the {SECRET} that this run's coordinator was started with"
    secret, notice = secret_of_environment(remedy), read_notice(run.store)
    if notice is not None and notice.secret_mark not in ("", mark_of(secret, run.run_id)):
        what = f"this {SECRET} is not the one that the run's coordinator has: it would refuse the token"
        raise ConfigError(what, where="the environment", remedy=f"{remedy}, or start it again with this one first")
    return tokens.create_token(run.store, run.run_id, secret, island, days).text


def revoke_tokens(path: str, island: str) -> int:
    """Makes all tokens of an island worthless, within seconds; returns how many there were."""
    return tokens.revoke_tokens(read_run(path).store, island)


def join(
    path: str,
    token: str,
    *,
    name: str | None = None,
    recipe: str | None = None,
    resources: Mapping[str, float] | None = None,
    wait_s: float = 600.0,
    tell: Callable[[str], None] = print,
) -> str:
    """Trains one island of a run whose coordinator is elsewhere, on this process's Ray or a local one, until the run
    is over; returns why it ended. recipe: refuse a run that is not of it. resources: of the island, instead of the
    recipe's. wait_s: for a coordinator that allows islands from outside, and then for room on this cluster.
    """
    key = Token.read(token)
    if name not in (None, key.island):
        what = f"this token is of island {key.island!r}, not {name!r}"
        raise ConfigError(what, where="--name", remedy="leave --name out, or have a token made for that island")
    run = open_as_island(path, wait_s, tell)
    if recipe is not None:
        remedy = "this is not the run of your recipe: compare its address, or leave --recipe out and train by the run's"
        check_same_recipe(run.document, RunConfig.from_yaml(recipe), run.store.url, remedy)
    body = run.config.model_dump(mode="json")
    body["cluster"]["label_selector"] = {}  # the labels are those of the coordinator's cluster
    if resources:
        body["cluster"]["island_resources"] = dict(resources)
    run = replace(run, config=RunConfig.from_dict(body, where="--resource"))
    RunStore(run.store.url_of(f"{MAIL}/{key.island}")).probe()
    check_token(run, key, tell)
    with connected(None):
        return join_on_ray(run, key, tell, wait_s)
