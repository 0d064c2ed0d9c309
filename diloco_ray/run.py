"""A run's folder: made from a recipe, or taken up again if the recipe still means the same run.

run.json      who the run is: recipe, model layout, data digest; written once
log/ payloads/ snapshots/ fences/     the log of outer steps (room `log`)
events/ status.json                   what people see
islands/                              the islands' own checkpoints
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.algorithm.fragments import Layout
from diloco_ray.config import RunConfig, differences
from diloco_ray.coordination.experiments import islands_by_round
from diloco_ray.coordination.state import Rules
from diloco_ray.coordinator.job import CoordinatorJob
from diloco_ray.data.batches import check_fills_a_batch
from diloco_ray.data.prepare import prepare
from diloco_ray.data.shards import TokenShards
from diloco_ray.document import DOCUMENT, FORMAT_VERSION, create, outer_of, write_beginning
from diloco_ray.errors import DataError, DeadlineError, RunMismatchError
from diloco_ray.ids import island_name
from diloco_ray.island.evaluator import EvaluationPlan
from diloco_ray.island.inner_optimizer import check_available, longest_move
from diloco_ray.island.job import IslandJob
from diloco_ray.log.record import unseal
from diloco_ray.log.run_store import RunStore
from diloco_ray.plan import check_model
from diloco_ray.transport.letters import NOTICE
from diloco_ray.transport.run_store import read_notice

CHANGE_BACK = "give the run another `--name`, or change these fields back to take the old run up again"
OR_DELETE = "or delete the folder, since no outer step has been taken yet"


@dataclass(frozen=True)
class Run:
    """An open run: its folder, its document, and the recipe it is driven by now."""

    store: RunStore
    config: RunConfig
    document: Mapping[str, Any]
    prepared_url: str  # where the run's token shards lie now

    @property
    def run_id(self) -> str:
        return self.document["run_id"]

    @property
    def layout(self) -> Layout:
        return Layout.from_dict(self.document["layout"])

    def coordinator_job(self, expected: Sequence[str] | None = None) -> CoordinatorJob:
        """expected: islands that a first round waits for (default: all that there may be)."""
        config, sync, layout = self.config, self.config.sync, self.layout
        uplink = get_codec(sync.uplink)
        rules = Rules(
            run_id=self.run_id,
            num_rounds=config.rounds,
            inner_steps_per_round=config.inner.steps_per_round,
            sequences_per_inner_step=config.inner.batch_size,
            num_fragments=len(layout.fragments),
            min_islands=config.min_islands,
            max_islands=config.max_islands,
            uplink=sync.uplink,
            payload_bytes=tuple(uplink.num_bytes(fragment.num_values) for fragment in layout.fragments),
            quorum=config.quorum,
            grace_s=sync.grace_s,
            heartbeat_timeout_s=sync.heartbeat_timeout_s,
            waiting_timeout_s=sync.waiting_timeout_s,
            weighting=sync.weighting,
            closes=sync.closes,
            overlap=sync.overlap,
            grace_share=sync.grace_share,
            launch_interval_s=sync.launch_interval_s,
            max_staleness=sync.max_staleness,
            steps_by_speed=config.inner.steps == "by_speed",
            drop_probability=config.experiment.drop_probability,
            drop_seed=config.seed,
            islands_by_round=islands_by_round(config.experiment.islands_by_round, config.max_islands, config.rounds),
            snapshot_every_rounds=config.storage.snapshot_every_rounds,
            max_norm_ratio=sync.max_norm_ratio,
            longest=tuple(longest_move(config.inner, fragment.num_values) for fragment in layout.fragments),
            max_inbox_bytes=sync.max_inbox_bytes,
        )
        return CoordinatorJob(
            rules=rules,
            layout=layout,
            outer=outer_of(self.document),
            downlink=sync.downlink,
            downlink_error_feedback=sync.downlink_error_feedback,
            shard_sizes=tuple(self.document["shard_sizes"]),
            sequence_length=config.data.sequence_length,
            expected=tuple(map(island_name, range(config.max_islands)) if expected is None else expected),
            join_timeout_s=sync.join_timeout_s,
            keep_snapshots=config.storage.keep_snapshots,
        )

    def island_job(self) -> IslandJob:
        config = self.config
        cache = Path(os.path.expanduser("~/.cache/diloco_ray")) / self.run_id
        own = self.store.url if self.store.is_local else str(cache)
        checkpoints = f"{config.inner.checkpoints}/{self.run_id}" if config.inner.checkpoints else own
        return IslandJob(
            run_id=self.run_id,
            seed=config.seed,
            num_inner_steps=config.num_inner_steps,
            layout=self.layout,
            data=config.data,
            prepared_url=self.prepared_url,
            model=config.model,
            inner=config.inner,
            outer=outer_of(self.document),
            sync=config.sync,
            checkpoints_url=f"{checkpoints}/islands",
        )

    def speed_of(self, number: int) -> float:
        """Of this island, relative to the others: an experiment's wish."""
        speeds = self.config.experiment.speeds
        return speeds[number] if number < len(speeds) else 1.0

    def evaluation_plan(self) -> EvaluationPlan:
        settings = self.config.evaluation
        return EvaluationPlan(
            every_rounds=settings.every_rounds,
            num_rounds=self.config.rounds,
            num_sequences=settings.num_sequences,
            batch_size=settings.batch_size,
            prompt=settings.prompt,
            sample_tokens=settings.sample_tokens,
        )


def open_run(config: RunConfig, *, progress: Callable[[int, int | None], None] | None = None) -> Run:
    """Prepares the data, creates or takes up the run's folder. Everything that can be refused is refused here."""
    store = RunStore(config.run_url)
    store.probe()
    check_available(config.inner)
    document = _existing(store)
    if document:
        has_trained = len(store.list("log")) > 1
        check_same_recipe(document, config, store.url, CHANGE_BACK if has_trained else f"{CHANGE_BACK}; {OR_DELETE}")
    else:
        check_model(config)
    shards = _open_data(config, progress)
    if document:
        _check_same_data(store, document, shards)
    else:
        document = create(store, config, shards)
    run = Run(store, config, document, RunStore(config.prepared_url).url)
    write_beginning(store, document, config, run.prepared_url)
    return run


def read_run(url: str) -> Run:
    """A run that is there already, with the recipe it was begun with."""
    store = RunStore(url)
    if not store.exists(DOCUMENT):
        raise RunMismatchError(
            f"no run at {store.url}: it has no {DOCUMENT}",
            where=store.url,
            remedy="name the run's folder, such as runs/quickstart",
        )
    document = _read_document(store)
    config = RunConfig.from_dict(document["config"], where=store.url_of(DOCUMENT))
    return Run(store, config, document, _prepared_now(store, document["prepared"]))


def open_as_island(url: str, wait_s: float, tell: Callable[[str], None]) -> Run:
    """A run whose coordinator is elsewhere, by the recipe that it is driven by now. DeadlineError where none opens."""
    store, until_s, is_told = RunStore(url), time.monotonic() + wait_s, False
    while (notice := read_notice(store)) is None or not store.exists(DOCUMENT):
        if time.monotonic() > until_s:
            raise DeadlineError(
                f"no coordinator has opened this run to islands from outside for {wait_s:g} s",
                where=store.url,
                remedy="start it with `diloco-ray train RECIPE --islands external`, and compare the addresses",
            )
        if not is_told:
            tell(f"waiting up to {wait_s:g} s for a coordinator at {store.url}")
            is_told = True
        time.sleep(min(1.0, wait_s))
    document = _read_document(store)
    config = RunConfig.from_dict(notice.config, where=store.url_of(NOTICE))
    remedy = "whoever runs the coordinator should look who else writes to this folder, and start it again"
    check_same_recipe(document, config, store.url_of(NOTICE), remedy)
    return Run(store, config, document, _prepared_now(store, document["prepared"]))


def _prepared_now(store: RunStore, url: str) -> str:
    """Where it was, or beside the run's folder, if both were moved together."""
    beside = f"{store.url.rsplit('/', 1)[0]}/data/{url.rsplit('/', 1)[-1]}"
    was_moved = not RunStore(url).exists("manifest.json") and RunStore(beside).exists("manifest.json")
    return beside if was_moved else url


def _read_document(store: RunStore) -> Mapping[str, Any]:
    """What another version wrote is refused before any of it is used."""
    document = unseal(store.read(DOCUMENT), store.url_of(DOCUMENT))
    if document.get("format") != FORMAT_VERSION:
        raise RunMismatchError(
            f"written in format {document.get('format')}, this version reads {FORMAT_VERSION}",
            where=store.url_of(DOCUMENT),
            remedy="use the version of diloco_ray that began the run",
        )
    return document


# ---- refusals ----


def refuse_recipe(path: str) -> None:
    """Says which run a recipe's is, where somebody named the recipe in its place."""
    if Path(path).expanduser().is_file():
        url = RunConfig.from_yaml(path).run_url
        raise RunMismatchError(
            f"{path} is a recipe, and the folder of a run is wanted here",
            where=path,
            remedy=f"name the folder of its run: {url}, unless it was given another --name or storage.path",
        )


def _existing(store: RunStore) -> Mapping[str, Any] | None:
    if store.exists(DOCUMENT):
        return _read_document(store)
    foreign = [name for name in store.list("") if not name.startswith(".")]
    if foreign:
        raise RunMismatchError(
            f"the run's folder has files but no {DOCUMENT}: {', '.join(foreign[:5])}",
            where=store.url,
            remedy="choose another `name` or `storage.path`, or empty the folder",
        )
    return None


def check_same_recipe(document: Mapping[str, Any], config: RunConfig, where: str, remedy: str) -> None:
    """RunMismatchError with every field in which the recipe is another run's."""
    changed = differences(document["identity"], config.identity())
    if changed:
        raise RunMismatchError(
            "this folder holds a run with another recipe:\n    " + "\n    ".join(changed),
            where=where,
            remedy=remedy,
        )


def _open_data(config: RunConfig, progress: Callable[[int, int | None], None] | None) -> TokenShards:
    """Prepares what is not prepared; refuses data that cannot fill a batch, be measured on, or all be trained on."""
    prepare(config.data, config.prepared_url, progress=progress)
    shards = TokenShards.open(config.prepared_url)
    length, train = config.data.sequence_length, shards.split("train")
    for shard in range(len(train.groups)):
        check_fills_a_batch(train, shard, config.inner.batch_size, length)
    if len(train.groups) > config.max_islands:
        idle = ", ".join(group.name for group in train.groups[config.max_islands :][:5])
        raise DataError(
            f"data.shards={config.data.shards} made {len(train.groups)} groups, more than the {config.max_islands} "
            f"islands there may be: no island would train on {idle}",
            where="data.shards",
            remedy=f"set islands to at least {len(train.groups)}, or choose a data.label_column with fewer values or "
            "fewer data.clusters",
        )
    shards.split("validation").num_sequences(length)  # raises where not even one is left
    return shards


def _check_same_data(store: RunStore, document: Mapping[str, Any], shards: TokenShards) -> None:
    if document["data_digest"] != shards.manifest.digest:
        raise RunMismatchError(
            f"begun on data {document['data_digest'][:12]}, prepared now is {shards.manifest.digest[:12]}",
            where=store.url,
            remedy="name the run's own shards in data.prepared, or begin a new run with another `--name`",
        )
