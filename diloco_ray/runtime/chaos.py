"""Chaos: the same recipe twice on a local Ray, calm and in a storm of faults, and what the difference was.

The runs are as long as the storm: the pace of a short pilot says how many rounds take the time asked for on a calm
day. The storm begins when the first round is whole; when its time is over the run goes on to its end in peace. Goodput
is what was committed while the storm raged, per second, against the calm run from its first round to its end; and,
since machines are not always equally fast, against the storm's own rounds between its faults.
"""

import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from rich.table import Table

from diloco_ray.config import RunConfig
from diloco_ray.document import replica_of
from diloco_ray.errors import ConfigError
from diloco_ray.log.record import Record
from diloco_ray.log.run_log import RunLog
from diloco_ray.log.verify import verify
from diloco_ray.observe.events import of_kind, read_events
from diloco_ray.run import Run, open_run
from diloco_ray.runtime.cluster import connected
from diloco_ray.runtime.driver import train_on_ray
from diloco_ray.runtime.second_node import HEALTH_CHECKS, SecondNode, second_node
from diloco_ray.runtime.storm import FROZEN_RAYLETS, PLACE, SHARES, Fault, Storm, schedule

PILOT_ROUNDS = 8
ZOMBIES_WITHIN_S = 15.0  # after the last one has been let go


def run_chaos(
    config: RunConfig, per_hour: float, minutes: float, seed: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Pilot, calm run, storm; the report as one JSON document, whose `ok` says that every invariant held."""
    if config.inner.ranks > 1 or config.cluster.external_islands:
        what = f"inner.ranks={config.inner.ranks}, cluster.external_islands={config.cluster.external_islands}"
        remedy = "set inner.ranks=1 and cluster.external_islands=0: a storm strikes islands of one process, on one Ray"
        raise ConfigError(what, where="chaos", remedy=remedy)
    if not 0.5 < (num_faults := per_hour * minutes / 60.0) < math.inf:
        what = f"{per_hour:g} faults an hour for {minutes:g} minutes make {num_faults:g}: that is no storm"
        remedy = f"one fault takes --minutes {60.0 / per_hour:g}, or --kills-per-hour {60.0 / minutes:g}"
        raise ConfigError(what, where="chaos", remedy=remedy)
    prefix = f"{config.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    cluster = config.cluster
    cluster = cluster.model_copy(update={"island_resources": {**cluster.island_resources, PLACE: 1.0}})

    def fresh(name: str, rounds: int) -> Run:
        return open_run(config.model_copy(update={"name": f"{prefix}-{name}", "rounds": rounds, "cluster": cluster}))

    with two_nodes(cluster.island_resources, config.max_islands) as node:
        pilot = _Watched(fresh("pilot", PILOT_ROUNDS))
        pilot.train()
        round_s = min(event["seconds"] for event in pilot.rounds)  # a slower one would let the run end before its storm
        rounds = max(PILOT_ROUNDS, math.ceil(minutes * 60.0 / round_s))
        tell(f"a round takes {round_s:.1f} s: {rounds} rounds for {minutes:g} minutes")
        calm = _Watched(fresh("calm", rounds))
        calm.train()
        tell(f"calm: {calm.tokens_per_s():,.0f} tokens/s committed, validation loss {calm.loss:.4f}")
        planned = schedule(per_hour, minutes, seed, without=() if node else FROZEN_RAYLETS)
        storm = Storm(planned, config.sync.heartbeat_timeout_s, tell, node)
        stormy = _Watched(fresh("storm", rounds), storm.see)
        try:
            stormy.train()
        finally:
            storm.stop()
        zombies = _wait_for_zombies(storm)
    return _report(calm, stormy, storm, minutes * 60.0, zombies)


@contextmanager
def two_nodes(island_resources: Mapping[str, float], num_places: int) -> Iterator[SecondNode | None]:
    """A local Ray whose second node has half of the islands' places. None where that cannot be: without /proc its
    raylet is not found, and this machine's accelerators belong to one node.
    """
    there = num_places // 2 if sys.platform == "linux" and not island_resources.get("GPU") else 0
    with connected("local", resources={PLACE: num_places - there}, _system_config=HEALTH_CHECKS):
        if there:
            with second_node({PLACE: there}) as node:
                yield node
        else:
            yield None


def _wait_for_zombies(storm: Storm) -> list[int]:
    until = time.monotonic() + ZOMBIES_WITHIN_S
    while (zombies := storm.zombies) and time.monotonic() < until:
        time.sleep(0.2)
    return zombies


@dataclass
class _Watched:
    """A run, and what was seen of it on its way: when how many tokens were committed, which outer steps were told."""

    run: Run
    see: Callable[[Mapping[str, Any]], None] = lambda status: None
    last: Mapping[str, Any] = field(default_factory=dict[str, Any])
    committed: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    told: set[int] = field(default_factory=set[int])

    def train(self) -> None:
        self.last = train_on_ray(self.run, self._watch)

    def _watch(self, status: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
        self.told |= {event["outer_step"] for event in of_kind(events, "outer_step")}
        if not status:
            return
        tokens = status["tokens"]["committed"]
        if status["rounds"] and (not self.committed or tokens > self.committed[-1][1]):
            self.committed.append((time.monotonic(), tokens))
        self.see(status)

    def tokens_per_s(self, within_s: float = math.inf) -> float:
        """Committed, from the first round on; of rounds that end later than `within_s` the part that lies before."""
        return tokens_per_s(self.committed, within_s)

    @property
    def rounds(self) -> Sequence[Mapping[str, Any]]:
        return of_kind(read_events(self.run.store), "round")

    @property
    def loss(self) -> float:
        return self.last["validation"]["last"]["loss"]


# ---- the report ----


def _report(calm: _Watched, stormy: _Watched, storm: Storm, storm_s: float, zombies: list[int]) -> dict[str, Any]:
    records = RunLog.open(stormy.run.store).records
    proof = verify(stormy.run.store, replica_of)
    lost = sorted(stormy.told - {record.index for record in records})
    doubled = num_doubled(records)
    in_storm, in_calm, tokens = stormy.tokens_per_s(storm_s), calm.tokens_per_s(), proof.tokens
    began_s = stormy.committed[0][0]
    between = tokens_per_s_between([seen for seen in stormy.committed if seen[0] - began_s <= storm_s], storm.faults)
    invariants = {
        "the run succeeded": stormy.last["state"] == "succeeded",
        "as many faults hit as the rate says": len(storm.faults) >= storm.num_planned,
        "the run got over every fault": all(fault.recovered_s is not None for fault in storm.faults),
        "no announced record is lost": not lost,
        "no data is committed twice": doubled == 0,
        "tokens are conserved": bool(tokens) and 2 * tokens["leased"] == sum(tokens.values()),
        "replay is bit-equal, verify finds nothing": proof.ok,
        "no zombie is left": not zombies,
    }
    return {
        "ok": all(invariants.values()),
        "invariants": invariants,
        "runs": {"calm": calm.run.store.url, "storm": stormy.run.store.url},
        "seconds": storm_s,
        "faults": {
            "hit": len(storm.faults),
            "missed": len(storm.missed),
            "by_kind": {kind: _of_kind(kind, storm) for kind in SHARES},
            "each": [asdict(fault) for fault in storm.faults],
        },
        "rounds": records[-1].round,
        "outer_steps": len(records) - 1,
        "contributions": _spread(stormy.rounds),
        "goodput": {
            "calm_tokens_per_s": in_calm,
            "storm_tokens_per_s": in_storm,
            "between_faults_tokens_per_s": between,
            "ratio": in_storm / in_calm,
            "ratio_to_between_faults": in_storm / between if between else None,
        },
        "loss": {"calm": calm.loss, "storm": stormy.loss, "difference": stormy.loss / calm.loss - 1.0},
        "tokens": tokens,
        "verify": {
            "problems": list(proof.problems),
            "records_lost": len(lost),
            "sequences_committed_twice": doubled,
            "digest": proof.digest,
        },
    }


def tokens_per_s(committed: Sequence[tuple[float, int]], within_s: float = math.inf) -> float:
    """From the first to the last, or to `within_s` after the first; a round that spans that moment counts in part."""
    (began_s, before), (end_s, most) = committed[0], committed[-1]
    if end_s - began_s <= within_s:
        return (most - before) / (end_s - began_s) if end_s > began_s else 0.0
    for begin, end in pairwise(committed):
        if end[0] - began_s > within_s:
            part = (began_s + within_s - begin[0]) / (end[0] - begin[0])
            return (begin[1] + part * (end[1] - begin[1]) - before) / within_s
    raise AssertionError("the last one is past within_s")


def tokens_per_s_between(committed: Sequence[tuple[float, int]], faults: Iterable[Fault]) -> float | None:
    """Of rounds that no fault touched, nor the round before; None where there are none. committed: seconds and tokens,
    from the storm's beginning on."""
    faults, tokens, seconds = list(faults), 0, 0.0
    for before, begin, end in zip(committed, committed[1:], committed[2:]):
        since_s, until_s = before[0] - committed[0][0], end[0] - committed[0][0]
        if not any(fault.at_s < until_s and fault.over_s > since_s for fault in faults):
            tokens, seconds = tokens + end[1] - begin[1], seconds + end[0] - begin[0]
    return tokens / seconds if seconds else None


def num_doubled(records: Iterable[Record]) -> int:
    """Sequences that more than one lease has spent, found without `verify`."""
    spent: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for record in records:
        for share in record.shares:
            for piece in share.spent:
                spent[piece.shard, piece.epoch].append((piece.start, piece.stop))
    doubled = 0
    for pieces in spent.values():
        reached = 0
        for start, stop in sorted(pieces):
            doubled += max(0, min(stop, reached) - start)
            reached = max(reached, stop)
    return doubled


def _of_kind(kind: str, storm: Storm) -> dict[str, Any]:
    faults = [fault for fault in storm.faults if fault.kind == kind]
    return {
        "hit": len(faults),
        "missed": storm.missed.count(kind),
        "detection_s": _percentiles(f.detected_s - f.at_s for f in faults if f.detected_s is not None),
        "recovery_s": _percentiles(max(0.0, f.recovered_s - f.from_s) for f in faults if f.recovered_s is not None),
        "not_recovered": sum(fault.recovered_s is None for fault in faults),
    }


def _percentiles(values: Iterable[float]) -> dict[str, float] | None:
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{p}": ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))] for p in (50, 95)}


def _spread(rounds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of the rounds that were told: the coordinator may be killed between a commit and the word of it."""
    return {
        name: {"mean": statistics.fmean(r[name] for r in rounds), "least": min(r[name] for r in rounds)}
        for name in ("alive", "contributed", "applied")
    }


def tables(report: Mapping[str, Any]) -> list[Table | str]:
    """The report as people read it."""
    faults = Table(box=None, pad_edge=False)
    for column in ("fault", "hit", "missed", "noticed after, p50", "p95", "over after, p50", "p95", "never"):
        faults.add_column(column, justify="left" if column == "fault" else "right")
    for kind, found in report["faults"]["by_kind"].items():
        seconds = [
            f"{times[p]:.1f} s" if times else ""
            for times in (found["detection_s"], found["recovery_s"])
            for p in ("p50", "p95")
        ]
        faults.add_row(kind, str(found["hit"]), str(found["missed"]), *seconds, str(found["not_recovered"]))
    spread = ", ".join(f"{n} {s['mean']:.2f} (least {s['least']})" for n, s in report["contributions"].items())
    struck, goodput, loss = report["faults"], report["goodput"], report["loss"]
    between = goodput["between_faults_tokens_per_s"]
    paired = f"; {between:,.0f} between faults: {goodput['ratio_to_between_faults']:.1%}" if between else ""
    lines = [
        f"{struck['hit']} faults in {report['seconds'] / 60:g} minutes; {struck['missed']} strikes hit nothing",
        f"{report['outer_steps']} outer steps; per round: {spread}",
        f"committed tokens/s: {goodput['storm_tokens_per_s']:,.0f} in the storm, {goodput['calm_tokens_per_s']:,.0f} "
        f"in the calm: goodput {goodput['ratio']:.1%}{paired}",
        f"validation loss: {loss['storm']:.4f} in the storm, {loss['calm']:.4f} in the calm, {loss['difference']:+.2%}",
        "tokens: " + ", ".join(f"{fate} {number:,}" for fate, number in report["tokens"].items()),
        *(f"{'held' if held else 'BROKEN'}: {name}" for name, held in report["invariants"].items()),
        *(f"problem: {problem}" for problem in report["verify"]["problems"]),
    ]
    return [faults, "\n".join(lines)]
