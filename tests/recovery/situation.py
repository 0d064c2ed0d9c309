"""Whole runs on a storage that is watched: what it held at each moment, and a run taken up from any of that."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

import diloco_ray.island.worker
import diloco_ray.run
from diloco_ray.config import RunConfig
from diloco_ray.document import replica_of
from diloco_ray.log.record import Record
from diloco_ray.log.run_log import RunLog, record_path
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.verify import verify
from diloco_ray.run import Run, open_run
from diloco_ray.simulation.in_process import train_in_process
from diloco_ray.simulation.storage import IOCall, Tap, TappedStore

Files = dict[str, bytes]
KEEPS_RESIDUALS: dict[str, Any] = {
    "rounds": 3,
    "sync": {"uplink": "topk", "error_feedback": 0.95, "downlink": "int4", "downlink_error_feedback": True},
}
SHORT: dict[str, Any] = {  # for a storage that takes its time
    "islands": 1,
    "rounds": 2,
    "sync": {"downlink": "int4", "downlink_error_feedback": True},
}


class SmallModel(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.head = nn.Linear(4, vocab_size)

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.head(self.layers[0](self.embedding(input_ids)))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


class Killed(BaseException):
    """The process is gone: no handler hears of it, and nothing that it does afterwards reaches the storage."""


class Recorder:
    """A tap that keeps what the run's folder holds at each moment at which a process can be killed. Dies at `dies_at`.

    On a disk a file can be torn: it is first written beside its name, and for a moment it has both names.
    """

    def __init__(self, dies_at: IOCall, tears: bool):
        self.contents: list[Files] = []
        self.files: Files = {}
        self._dies_at, self._tears = dies_at, tears
        self._is_dead = False

    def revive(self) -> None:
        assert self._is_dead, f"{self._dies_at} never happened"
        self._is_dead = False

    def __call__(self, call: IOCall) -> None:
        if self._is_dead:
            raise Killed
        path, data = call.path, bytes(call.data)
        match call.act, call.moment:
            case "write" | "create", "before" if self._tears:
                beside = f"{path.rpartition('/')[0]}/.tmp-killed".strip("/")
                self.contents += [
                    {**self.files, beside: data[: len(data) // 2]},
                    {**self.files, beside: data, path: data},
                ]
            case "write" | "create", "after":
                self.files = {**self.files, path: data}
            case "delete", "after":
                self.files = {name: data for name, data in self.files.items() if name != path}
            case _:
                pass
        self.contents.append(self.files)
        if call == self._dies_at:
            self._is_dead = True
            raise Killed


class Situation:
    """A recipe, and the storage that its runs lie on."""

    def __init__(self, tiny: dict[str, Any], tmp_path: Path, url: str, tears: bool = False):
        self.url, self.tears = url, tears
        self._body = {**tiny, "name": "run", "model": {"factory": f"{__name__}:SmallModel"}}
        self._body["data"] = {**tiny["data"], "prepared": str(tmp_path / "prepared")}
        self._num_folders = 0

    def folder(self) -> str:
        self._num_folders += 1
        return f"{self.url}/{self._num_folders}"

    def config(self, folder: str, recipe: dict[str, Any]) -> RunConfig:
        """Islands keep their checkpoints in the run's folder too, wherever it lies."""
        inner = {"steps_per_round": 2, "batch_size": 1, "checkpoints": f"{folder}/run"}
        storage = {"path": folder, "snapshot_every_rounds": 1, "keep_snapshots": 1}
        body = {**self._body, "islands": 2, "rounds": 2, **recipe}
        body["inner"] = {**inner, **recipe.get("inner", {})}
        body["storage"] = {**storage, **recipe.get("storage", {})}
        body["evaluation"] = {"every_rounds": 9, "num_sequences": 1, "sample_tokens": 0}
        return RunConfig.from_dict(body)

    def trained(self, config: RunConfig, tap: Tap = lambda call: None) -> Run:
        """The command, to its end. The tap hears of each call to the run's folder, with the path in it."""

        def open_store(url: str) -> RunStore:
            if not url.startswith(config.run_url):
                return RunStore(url)
            below = url.removeprefix(config.run_url)
            return TappedStore(url, lambda call: tap(replace(call, path=f"{below}/{call.path}".strip("/"))))

        with pytest.MonkeyPatch.context() as patch:
            for module in (diloco_ray.run, diloco_ray.island.worker):
                patch.setattr(module, "RunStore", open_store)
            run = open_run(config)
            train_in_process(run)
        return run

    def recorded(self, recipe: dict[str, Any]) -> Recorder:
        """A run that was killed right after the last commit of its first round, and taken up again to its end."""
        config = self.config(self.folder(), recipe)
        recorder = Recorder(IOCall("create", record_path(config.sync.fragments), "after"), self.tears)
        with pytest.raises(Killed):
            self.trained(config, recorder)
        recorder.revive()
        run = self.trained(config, recorder)
        assert all(run.store.read(path) == data for path, data in recorder.files.items())
        return recorder

    def taken_up(self, recipe: dict[str, Any], files: Files | None = None) -> Run:
        """The same command, to the end, where a kill left these files."""
        config = self.config(self.folder(), recipe)
        for path, data in (files or {}).items():
            RunStore(config.run_url).write(path, data)
        return self.trained(config)


def digests(records: Sequence[Record]) -> list[tuple[str, str]]:
    return [(record.parameters_digest, record.optimizer_digest) for record in records]


def records_of(run: Run) -> list[Record]:
    return RunLog.open(run.store).records


def assert_whole(run: Run, records: Sequence[Record], left: Files) -> None:
    """Nothing that was committed before the kill is missing or changed, and every token has its fate."""
    assert verify(run.store, replica_of).problems == ()
    num_committed = sum(record_path(index) in left for index in range(len(records) + 1))
    assert [record.to_bytes() for record in records[:num_committed]] == [
        left[record_path(index)] for index in range(num_committed)
    ]
    tokens = records[-1].tokens
    assert tokens["leased"] == sum(tokens[fate] for fate in tokens if fate != "leased")
    assert tokens["rejected"] == 0
