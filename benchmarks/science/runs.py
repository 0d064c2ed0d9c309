"""Runs of the real engine, several at a time, each finished one kept: outcome.json in its folder is the cache.

A folder's name holds a digest of all that decides the result, so a changed recipe gets a new folder, equal recipes of
different rows share one, and a command that was interrupted goes on where it was. What is not in the digest is the
code: after a change of the engine begin with another --runs, or delete the folder.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import chain
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.science.variants import RECIPE, VARIANTS, WARM_START, Variant
from diloco_ray import api
from diloco_ray.config import RunConfig
from diloco_ray.data.prepare import prepare
from diloco_ray.ids import canonical_json, sha256_hex
from diloco_ray.log.run_store import RunStore
from diloco_ray.observe.events import of_kind, read_events
from diloco_ray.run import open_run
from diloco_ray.simulation.in_process import train_in_process

OUTCOME = "outcome.json"
STEPS_PER_POINT = 100  # of a curve
ALL_SEQUENCES = 8192  # a corpus with labels may be sorted by them: the whole held-out part is measured


@dataclass(frozen=True)
class Corpus:
    path: str
    text_column: str = "text"
    label_column: str | None = None


@dataclass(frozen=True)
class Outcome:
    """One finished run. tokens, losses: the curve, from the start to the end. fewer_bytes: how many times fewer bytes
    went up and down than float32 gradients in every step would have been; 0 where one worker has nobody to tell."""

    tokens: list[int]
    losses: list[float]
    fewer_bytes: float
    seconds: float

    @property
    def loss(self) -> float:
        return self.losses[-1]


Outcomes = dict[str, list[Outcome]]  # by variant, in the order of the seeds


@dataclass(frozen=True)
class Laboratory:
    """Where runs lie and what they read."""

    corpus: Corpus
    folder: str

    def warm_start(self, seed: int) -> RunConfig:
        return self._named("warm start", seed, RunConfig.from_yaml(WARM_START, self._common(seed)))

    def config(self, variant: Variant, seed: int) -> RunConfig:
        fields = [field.format(label_column=self.corpus.label_column) for field in variant.fields]
        if not variant.from_scratch:
            fields.append(f"model.weights={_export(self.warm_start(seed))}")
        return self._named(variant.name, seed, RunConfig.from_yaml(RECIPE, [*self._common(seed), *fields]))

    def _common(self, seed: int) -> list[str]:
        corpus = self.corpus
        data = [f"data.corpus={corpus.path}", f"data.text_column={corpus.text_column}"]
        return [f"seed={seed}", *data, f"storage.path={self.folder}", "evaluation.sample_tokens=0"]

    def _named(self, name: str, seed: int, config: RunConfig) -> RunConfig:
        measured: dict[str, Any] = {"every_rounds": max(1, STEPS_PER_POINT // config.inner.steps_per_round)}
        if self.corpus.label_column:
            measured |= {"num_sequences": ALL_SEQUENCES, "every_rounds": config.rounds}
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=measured)})
        body = config.model_dump(mode="json", exclude={"name": True, "storage": True, "cluster": True})
        slug = re.sub(r"[^a-z0-9.]+", "_", name.lower()).strip("_.")
        return config.model_copy(update={"name": f"{slug}-seed{seed}-{sha256_hex(canonical_json(body))[:10]}"})


def carry_out(
    laboratory: Laboratory, names: Iterable[str], seeds: Sequence[int], num_workers: int, say: Callable[[str], None]
) -> Outcomes:
    """Trains what is not trained yet: warm starts, then all in-process variants, then those on Ray, one by one."""
    variants = [VARIANTS[name] for name in names]
    first = seeds[0]
    for config in [laboratory.warm_start(first), *(laboratory.config(variant, first) for variant in variants)]:
        prepare(config.data, config.prepared_url)  # once, before workers ask for it together
    seeds_of = {variant: seeds[:1] if variant.on_ray else seeds for variant in variants}
    found: dict[tuple[Variant, int], Outcome] = {}
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), torch.set_num_threads, (1,))
    try:
        warm = set(chain.from_iterable(seeds_of[variant] for variant in variants if not variant.from_scratch))
        starting = {pool.submit(_warm_start, laboratory.warm_start(seed)): seed for seed in sorted(warm)}
        for done in as_completed(starting):
            say(_line("warm start", starting[done], done.result()))
        pairs = [(variant, seed) for variant in variants if not variant.on_ray for seed in seeds_of[variant]]
        running = {pool.submit(_outcome, laboratory.config(*pair)): pair for pair in pairs}
        for number, done in enumerate(as_completed(running), start=1):
            variant, seed = running[done]
            found[variant, seed] = done.result()
            say(f"{number} of {len(pairs)}: {_line(variant.name, seed, done.result())}")
    finally:
        pool.shutdown(cancel_futures=True)
    for variant in variants:
        if variant.on_ray:
            found[variant, first] = _outcome(laboratory.config(variant, first), on_ray=True)
            say(_line(variant.name, first, found[variant, first]))
    return {variant.name: [found[variant, seed] for seed in seeds_of[variant]] for variant in variants}


def _line(name: str, seed: int, outcome: Outcome) -> str:
    return f"{name}, seed {seed}: {outcome.loss:.4f}, {outcome.seconds:.0f} s"


def _warm_start(config: RunConfig) -> Outcome:
    outcome = _outcome(config)
    api.export(config.run_url, _export(config))
    return outcome


def _export(config: RunConfig) -> str:
    return f"{config.run_url}/export"


def _outcome(config: RunConfig, on_ray: bool = False) -> Outcome:
    """Of a run that is finished, or is trained now."""
    store = RunStore(config.run_url)
    if store.exists(OUTCOME):
        return Outcome(**json.loads(store.read(OUTCOME)))
    began = time.monotonic()
    run = open_run(config)
    if on_ray:
        api.DiLoCoTrainer(config).fit(watch=lambda status, events: None)
    else:
        train_in_process(run)
    events = read_events(run.store)
    curve = {event["round"]: event["loss"] for event in of_kind(events, "evaluation")}
    rounds = {event["round"]: event for event in of_kind(events, "round")}
    assert max(curve) == config.rounds, f"{run.store.url} was measured up to round {max(curve)} of {config.rounds}"
    num_bytes = sum(event["bytes_up"] + event["bytes_down"] for event in rounds.values())
    outcome = Outcome(
        tokens=[sum(event["tokens"] for r, event in rounds.items() if r <= last) for last in sorted(curve)],
        losses=[curve[last] for last in sorted(curve)],
        fewer_bytes=sum(event["data_parallel_bytes"] for event in rounds.values()) / num_bytes,
        seconds=time.monotonic() - began,
    )
    store.write(OUTCOME, json.dumps(asdict(outcome)).encode())
    return outcome


def final_losses(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.loss for outcome in outcomes]
