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
        self.store = RunStore(scratch.url.removesuffix("as-made") + "run")
        self.store.create(DOCUMENT, seal(document))
        write_beginning(self.store, document, config, config.prepared_url)
        self.run = Run(self.store, config, document, config.prepared_url)

    def copied_to(self, tap: Tap) -> TappedStore:
        """A store of its own for one story, with the beginning in it."""
        store = TappedStore(f"memory://story-{next(_number)}/run", tap)
        for path in _files(self.store):
            RunStore.write(store, path, self.store.read(path))
        return store

    def run_in(self, store: RunStore) -> Run:
        config = self.run.config
        inner = config.inner.model_copy(update={"checkpoints": store.url.removesuffix("/run") + "/checkpoints"})
        return replace(self.run, store=store, config=config.model_copy(update={"inner": inner}))


def forget(store: RunStore) -> None:
    """Everything that a story has stored."""
    folder = store.url.removeprefix("memory:/").removesuffix("/run")
    if MemoryFileSystem().exists(folder):
        MemoryFileSystem().rm(folder, recursive=True)


def _files(store: RunStore, folder: str = "") -> list[str]:
    paths = [f"{folder}/{name}" if folder else name for name in store.list(folder)]
    return [file for path in paths for file in ([path] if "." in path.rsplit("/")[-1] else _files(store, path))]
