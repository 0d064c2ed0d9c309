"""An island's own checkpoint: the inner optimizer's state at the start of a round, and what error feedback keeps back.

It is written before the round's contribution is submitted, and those before it are kept of which the work may have to
be done again: whatever the coordinator has committed when everything stops, the island can go on from there bit for
bit. Parameters are not in it; they come from the log.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from diloco_ray.errors import CorruptionError, StoreError
from diloco_ray.island.inner_optimizer import InnerOptimizer, load_state_tensors_, state_tensors
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.snapshot import load_tensors, save_tensors

KEPT = 3  # an island has two plans in hand at most, and both may be done when the first of them is void
RESIDUALS = "residuals-"


@dataclass
class IslandCheckpoints:
    """The checkpoints of one island, by round, in a folder of its own."""

    store: RunStore
    run_id: str

    def __post_init__(self) -> None:
        self.store.sweep()

    def save(self, round: int, optimizer: InnerOptimizer, own_steps: int | None) -> None:
        """own_steps: see `learning_rate_at`."""
        meta = {"run_id": self.run_id, "round": round, "own_steps": own_steps}
        save_tensors(self.store, _path(round), state_tensors(optimizer), meta)
        for old in [r for r in self.rounds() if r <= round][:-KEPT]:  # later ones are not of this run
            self.delete(old)

    def load_(self, round: int, optimizer: InnerOptimizer) -> tuple[int, int | None] | None:
        """Loads the newest checkpoint at or before `round`; returns its round and own_steps, or None if there is none.

        A damaged one, or one of another run, is passed over: an older one or a fresh start is right as well.
        """
        for candidate in reversed([r for r in self.rounds() if r <= round]):
            try:
                tensors, meta = load_tensors(self.store, _path(candidate))
            except (CorruptionError, StoreError):
                continue
            if meta["run_id"] == self.run_id:
                load_state_tensors_(optimizer, tensors)
                return candidate, meta["own_steps"]
        return None

    def save_residuals(self, round: int, residuals: Sequence[Tensor]) -> None:
        """Of error feedback, one per fragment: known only once the round's last contribution is encoded."""
        tensors = {str(p): residual for p, residual in enumerate(residuals)}
        save_tensors(self.store, _residuals_path(round), tensors, {"run_id": self.run_id})
        for old in [r for r in self._rounds(RESIDUALS) if r <= round][:-KEPT]:
            self._delete(_residuals_path(old))

    def load_residuals_(self, round: int, residuals: Sequence[Tensor]) -> None:
        """The newest at or before `round`: what a round that does not count took out is put back. Else zeros."""
        tensors: Mapping[str, Tensor] = {}
        for candidate in reversed([r for r in self._rounds(RESIDUALS) if r <= round] if residuals else []):
            with contextlib.suppress(CorruptionError, StoreError):
                found, meta = load_tensors(self.store, _residuals_path(candidate))
                tensors = found if meta["run_id"] == self.run_id else {}
            if tensors:
                break
        for p, residual in enumerate(residuals):
            residual.copy_(tensors[str(p)]) if str(p) in tensors else residual.zero_()

    def rounds(self) -> list[int]:
        return self._rounds("")

    def _rounds(self, prefix: str) -> list[int]:
        found = [re.fullmatch(rf"{prefix}([0-9]{{8,}})\.json", name) for name in self.store.list("")]
        return sorted(int(match[1]) for match in found if match)

    def delete(self, round: int) -> None:
        self._delete(_path(round), _residuals_path(round))

    def _delete(self, *paths: str) -> None:
        """The name first: tensors that nothing names are no checkpoint."""
        names = self.store.list("")
        for path in paths:
            for name in (f"{path}.json", *(name for name in names if name.startswith(f"{path}-"))):
                self.store.delete(name)


def _path(round: int) -> str:
    return f"{round:08d}"


def _residuals_path(round: int) -> str:
    return f"{RESIDUALS}{round:08d}"
