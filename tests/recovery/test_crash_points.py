"""A whole run, islands and coordinator in one process, is killed at every I/O call and the same command is given again.

What a kill leaves is what the storage holds at that moment. So one run is recorded, with the storage's content before
and after each of its calls; then every content that occurred is put into a fresh store and the run is taken up from it.
Kills between which nothing was written leave the same content, from which the run is taken up once. The recorded run is
itself killed once and taken up again, so that the calls of a resume are among those that are killed at.
"""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from torch import Tensor, nn

import diloco_ray.island.worker
import diloco_ray.run
from diloco_ray.config import RunConfig
from diloco_ray.document import replica_of
from diloco_ray.log.record import Record
from diloco_ray.log.run_log import RunLog, record_path
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.verify import verify
from diloco_ray.observe.events import of_kind, read_events
from diloco_ray.run import Run, open_run
from diloco_ray.simulation.in_process import train_in_process
from diloco_ray.simulation.storage import IOCall, TappedStore

Files = dict[str, bytes]

KEEPS_RESIDUALS: dict[str, Any] = {
    "rounds": 3,
    "sync": {"uplink": "topk", "error_feedback": 0.95, "downlink": "int4", "downlink_error_feedback": True},
}
IN_A_BUCKET: dict[str, Any] = {  # the same for fewer calls, which here take their time
    "islands": 1,
    "rounds": 2,
    "sync": {"downlink": "int4", "downlink_error_feedback": True},
}
OTHERS: dict[str, dict[str, Any]] = {
    "two fragments": {"sync": {"fragments": 2, "offsets": "together"}},
    "streaming": {"sync": {"preset": "streaming", "fragments": 2, "overlap": 1}},
    "eager": {"sync": {"preset": "eager", "fragments": 2}},
    "async": {"sync": {"preset": "async"}},
    "decoupled": {"sync": {"preset": "decoupled", "fragments": 3}},
    "many records after the last snapshot, with Muon": {
        "rounds": 4,
        "inner": {"optimizer": "muon"},
        "storage": {"snapshot_every_rounds": 100},
    },
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
    """Keeps what the run's folder holds at each moment at which a process can be killed. Dies once, at `dies_at`."""

    def __init__(self, folder: str, dies_at: IOCall, tears: bool):
        self.contents: list[Files] = []
        self.files: Files = {}
        self._folder, self._dies_at, self._tears = folder, dies_at, tears
        self._is_dead = False

    def open(self, url: str) -> RunStore:
        """A store of the run; those of others, such as of prepared data, are left alone."""
        if not url.startswith(self._folder):
            return RunStore(url)
        return TappedStore(url, partial(self._heard, url.removeprefix(self._folder).strip("/")))

    def revive(self) -> None:
        assert self._is_dead, f"{self._dies_at} never happened"
        self._is_dead = False

    def _heard(self, below: str, call: IOCall) -> None:
        if self._is_dead:
            raise Killed
        path = f"{below}/{call.path}".strip("/")
        match call.act, call.moment:
            case "write" | "create", "before" if self._tears:
                self._keep_torn(path, bytes(call.data))
            case "write" | "create", "after":
                self.files = {**self.files, path: bytes(call.data)}
            case "delete", "after":
                self.files = {name: data for name, data in self.files.items() if name != path}
            case _:
                pass
        self.contents.append(self.files)
        if call == self._dies_at:
            self._is_dead = True
            raise Killed

    def _keep_torn(self, path: str, data: bytes) -> None:
        """On a disk a file is first written beside its name, and for a moment it has both names."""
        beside = f"{path.rpartition('/')[0]}/.tmp-killed".strip("/")
        self.contents += [{**self.files, beside: data[: len(data) // 2]}, {**self.files, beside: data, path: data}]


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

    def recorded(self, recipe: dict[str, Any]) -> Recorder:
        """A run that was killed right after the last commit of its first round, and taken up again to its end."""
        config = self.config(self.folder(), recipe)
        commit = IOCall("create", record_path(config.sync.fragments), "after")
        recorder = Recorder(config.run_url, commit, self.tears)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(diloco_ray.run, "RunStore", recorder.open)
            patch.setattr(diloco_ray.island.worker, "RunStore", recorder.open)
            with pytest.raises(Killed):
                train_in_process(open_run(config))
            recorder.revive()
            train_in_process(open_run(config))
        assert all(RunStore(config.run_url).read(path) == data for path, data in recorder.files.items())
        return recorder

    def taken_up(self, recipe: dict[str, Any], files: Files | None = None) -> Run:
        """The same command, to the end, where a kill left these files."""
        config = self.config(self.folder(), recipe)
        for path, data in (files or {}).items():
            RunStore(config.run_url).write(path, data)
        run = open_run(config)
        train_in_process(run)
        return run


@pytest.fixture
def situation(
    request: pytest.FixtureRequest, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Situation]:
    match getattr(request, "param", "memory"):
        case "local":
            monkeypatch.setattr(os, "fsync", lambda handle: None)  # it is for power cuts, and there is none here
            yield Situation(tiny, tmp_path, str(tmp_path / "killed"), tears=True)
        case "memory":
            yield Situation(tiny, tmp_path, "memory://killed")
            MemoryFileSystem().rm("/killed", recursive=True)
        case _:
            yield Situation(tiny, tmp_path, f"{request.getfixturevalue('s3_bucket')}/killed")


def distinct(contents: list[Files]) -> list[tuple[Files, int]]:
    """Each content once, and at how many moments the storage held it."""
    found: dict[frozenset[tuple[str, bytes]], int] = {}
    for files in contents:
        content = frozenset(files.items())
        found[content] = found.get(content, 0) + 1
    return [(dict(content), count) for content, count in found.items()]


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


@pytest.mark.parametrize("situation", ["local", "memory", "s3"], indirect=True)
def test_a_run_killed_at_any_io_call_ends_with_the_bits_of_one_that_was_not(
    situation: Situation, request: pytest.FixtureRequest
) -> None:
    """With error feedback: the beginning, the fence, commits, residuals, checkpoints, snapshots, pruning."""
    recipe = IN_A_BUCKET if "s3" in situation.url else KEEPS_RESIDUALS
    expected = digests(records_of(situation.taken_up(recipe)))
    contents = situation.recorded(recipe).contents
    num_recovered = 0
    for left, num_moments in distinct(contents):
        run = situation.taken_up(recipe, left)
        records = records_of(run)
        assert_whole(run, records, left)
        assert digests(records) == expected
        num_recovered += num_moments
    print(f"\n{request.node.callspec.id}: {len(contents)} enumerated, {num_recovered} recovered")
    assert len(contents) == num_recovered
    assert len(contents) > 150


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_of_any_recipe_killed_at_any_io_call_is_whole(situation: Situation, name: str) -> None:
    """Where training goes on while fragments travel, what an island had not yet sent is gone with it, and only then."""
    recipe = OTHERS[name]
    whole = records_of(situation.taken_up(recipe))
    contents = situation.recorded(recipe).contents
    num_recovered = 0
    for left, num_moments in distinct(contents):
        run = situation.taken_up(recipe, left)
        records = records_of(run)
        assert_whole(run, records, left)
        sync, tail, end = run.config.sync, records[-1], whole[-1]
        assert tail.round == end.round == run.config.rounds
        refused = [e["text"] for e in of_kind(read_events(run.store), "decision") if "rejected" in e["text"]]
        if sync.closes == "quorum":  # a round is repeated of which a fragment is committed: not once more
            refused = [line for line in refused if not line.endswith("another payload with this key is committed")]
        assert refused == []
        if sync.closes == "all":
            assert (tail.index, tail.tokens["committed"]) == (end.index, end.tokens["committed"])
        num_steps = sum(path.startswith("log/0") for path in left) - 1
        between_fragments = num_steps > 0 and num_steps % sync.fragments != 0
        if sync.closes == "all" and sync.overlap == 0 and not between_fragments:
            assert digests(records) == digests(whole)
        num_recovered += num_moments
    print(f"\n{name}: {len(contents)} enumerated, {num_recovered} recovered")
    assert len(contents) == num_recovered
    assert len(contents) > 150
