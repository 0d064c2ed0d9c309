"""The beginning that all stories of one scenario share: token shards, run.json, snapshot 0 and record 0."""

import itertools
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

from diloco_ray.config import RunConfig
from diloco_ray.data.prepare import prepare
from diloco_ray.data.shards import TokenShards
from diloco_ray.document import DOCUMENT, create, write_beginning
from diloco_ray.island.job import IslandJob
from diloco_ray.log.record import seal
from diloco_ray.log.run_store import RunStore
from diloco_ray.run import Run
from diloco_ray.simulation.scenario import BASE, merged
from diloco_ray.simulation.storage import Tap, TappedStore

RUN_ID = "5eed" * 8  # a name drawn by chance would make traces differ
_number = itertools.count()


def prepared_data(folder: Path) -> str:
    """Token shards for every story, made once."""
    corpus, rng = folder / "corpus.txt", random.Random(0)
    if not corpus.exists():
        words = ["".join(rng.choices("aeinorst", k=rng.randint(2, 8))) for _ in range(50)]
        corpus.write_text("\n\n".join(" ".join(rng.choices(words, k=12)) for _ in range(150)))
    config = _config({}, folder)
    prepare(config.data, config.prepared_url)
    return config.prepared_url


def _config(recipe: Mapping[str, Any], folder: Path) -> RunConfig:
    data = {"corpus": str(folder / "corpus.txt"), "prepared": str(folder / "shards")}
    storage = {"path": "memory://stories"}
    return RunConfig.from_dict(merged(merged(BASE, recipe), {"name": "story", "data": data, "storage": storage}))


class Beginning:
    """folder: where `prepared_data` put its shards."""

    def __init__(self, recipe: Mapping[str, Any], folder: Path):
        config = _config(recipe, folder)
        scratch = RunStore(f"memory://beginning-{next(_number)}/as-made")
        document = {**create(scratch, config, TokenShards.open(config.prepared_url)), "run_id": RUN_ID}
        store = RunStore(scratch.url.removesuffix("as-made") + "run")
        store.create(DOCUMENT, seal(document))
        write_beginning(store, document, config, config.prepared_url)
        run = Run(store, config, document, config.prepared_url)
        self.max_islands, self.speed_of = config.max_islands, run.speed_of
        self.coordinator_job, self._island_job = run.coordinator_job(), run.island_job()
        self._files = {path: store.read(path) for path in _files(store)}
        forget(store)  # stories list their folders: what else lies in memory would only be in the way

    def copied_to(self, tap: Tap) -> TappedStore:
        """A store of its own for one story, with the beginning in it."""
        store = TappedStore(f"memory://story-{next(_number)}/run", tap)
        for path, data in self._files.items():
            store.write(path, data)
        return store

    def island_job(self, store: RunStore) -> IslandJob:
        """With the islands' own checkpoints beside this store."""
        return replace(self._island_job, checkpoints_url=store.url.removesuffix("/run") + "/checkpoints")


def forget(store: RunStore) -> None:
    """Everything that a beginning or a story has stored."""
    folder, files = store.url.removeprefix("memory:/").removesuffix("/run"), MemoryFileSystem.store
    for path in [path for path in files if path.startswith(f"{folder}/")]:
        del files[path]


def _files(store: RunStore, folder: str = "") -> list[str]:
    paths = [f"{folder}/{name}" if folder else name for name in store.list(folder)]
    return [file for path in paths for file in ([path] if "." in path.rsplit("/")[-1] else _files(store, path))]
