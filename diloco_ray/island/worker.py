"""The life of one island: DiLoCo (arXiv 2311.08105), Algorithm 1, as one worker sees it, in the general form of
Streaming DiLoCo (arXiv 2501.18512), Algorithm 2: fragment by fragment, and with training going on meanwhile.

    run H inner steps; after each of them
        send Q(base - island) of the fragments whose turn it is
        merge the fragments whose outer step was sent for tau inner steps ago

With one fragment and tau = 0 that is: fetch the base, run H inner steps, subtract, submit, wait. The inner optimizer's
state stays here: never sent, never reset at a round's end, never touched by what arrives.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.algorithm.fragments import Fragment
from diloco_ray.algorithm.merging import EagerCorrection, merge_
from diloco_ray.algorithm.schedule import send_steps
from diloco_ray.coordination.messages import InnerPlan
from diloco_ray.data.batches import batches
from diloco_ray.data.shards import TokenShards
from diloco_ray.island.checkpoint import IslandCheckpoints
from diloco_ray.island.exchange import Exchange
from diloco_ray.island.gang import Gang
from diloco_ray.island.gang_exchange import GangExchange
from diloco_ray.island.inner_loop import InnerLoop
from diloco_ray.island.inner_optimizer import build_inner_optimizer, learning_rate_at
from diloco_ray.island.job import Identity, IslandJob, RoundAbandonedError, RunOverError
from diloco_ray.island.parallel import place_model
from diloco_ray.island.part import Part
from diloco_ray.island.threads import Threads
from diloco_ray.log.run_store import RunStore
from diloco_ray.transport.protocol import Transport

Moment = Literal["step", "wait"]  # between two inner steps; waiting for the exchange


@dataclass(frozen=True)
class _Due:
    """A merge that is to come: of one fragment, with the outer step of this round, when so many steps are done."""

    at: int
    fragment: int
    round: int


class Island:
    """An island, or one rank of it. `live` is its whole life; whoever drives it decides what a moment of waiting is."""

    def __init__(
        self,
        job: IslandJob,
        identity: Identity,
        transport: Transport | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        threads: Threads | None = None,
        gang: Gang | None = None,
    ):
        """transport: None on the ranks of a gang that do not lead it."""
        if job.inner.threads is not None:
            torch.set_num_threads(job.inner.threads)
        self.job = job
        self.on_step: Callable[[InnerPlan], None] = lambda plan: None  # may raise to end the work on it
        self._now_s = clock
        shards = TokenShards.open(job.prepared_url)
        self._train = shards.split("train")
        self._gang, num_ranks, rank = gang, gang.size if gang else 1, gang.rank if gang else 0
        self._parallel = place_model(job, shards.manifest, num_ranks)
        self._tensors = self._parallel.tensors
        holdings = [[self._parallel.holding(f, r) for r in range(num_ranks)] for f in job.layout.fragments]
        self._held = [everyones[rank].fragment for everyones in holdings]
        self._spread: Callable[[int, Tensor], Tensor] = lambda p, base: base
        folder = f"{job.checkpoints_url}/{identity.island}"
        self.link: Exchange | GangExchange  # what the loop below asks
        if gang:
            part = Part(job, gang, holdings)
            self.link, self._spread = GangExchange(job, identity, gang, part, transport, threads), part.spread
            folder = f"{folder}/{job.inner.parallel}-rank-{rank}-of-{num_ranks}"
        else:
            self.link = Exchange(job, identity, cast(Transport, transport), threads)
        self._checkpoints = IslandCheckpoints(RunStore(folder), job.run_id)
        self.link.on_encoded = self._save_residuals
        self._new_optimizer()
        self._stands_at = -1  # the round at whose start parameters and optimizer stand; -1: nowhere
        self._own_steps: int | None = None
        self._num_steps = 0  # inner steps of this process
        self._due: deque[_Due] = deque()
        self._merged_at = [0 for _ in job.layout.fragments]
        # Where nobody is waited for, a fragment is merged when its outer step arrives.
        self._waits = job.sync.closes != "quorum" or job.sync.overlap == 0
        self._corrections: list[EagerCorrection] = []
        self._inner_s = self._saving_s = self._told_s = 0.0

    @property
    def exchange(self) -> Exchange:
        """Of the one process that speaks with the coordinator."""
        return cast(Exchange, self.link.lead) if isinstance(self.link, GangExchange) else self.link

    def start(self) -> None:
        self.link.start()

    def live(self) -> Iterator[Moment]:
        """Trains until the run is over."""
        try:
            while True:
                self.link.poll()
                while (plan := self.link.next_plan()) is None:
                    yield "wait"
                    self.link.poll()
                try:
                    yield from self._work(plan)
                except RoundAbandonedError:
                    yield from self._abandon(plan)
        except RunOverError:
            return

    def _wait_until(self, condition: Callable[[], bool], plan: InnerPlan | None) -> Iterator[Moment]:
        while not condition():
            self.link.check(plan)
            yield "wait"
            self.link.poll()

    # ---- one round ----

    def _work(self, plan: InnerPlan) -> Iterator[Moment]:
        if plan.first_round != self._stands_at:
            yield from self._begin_afresh(plan)
        if not self._num_steps:
            self._told_s = self._now_s()  # until now it waited for others to join, not for an exchange
        self._seed_dropout(plan)
        job, own, num_silent = self.job, self._own_steps, plan.silent_steps
        loop = InnerLoop(
            self._parallel,
            self._optimizer,
            batches(self._train, plan.ranges, job.inner.batch_size, job.data.sequence_length, job.seed),
            job.inner,
            learning_rate=lambda step: learning_rate_at(
                job.inner, plan.first_inner_step + step, job.num_inner_steps, None if own is None else own + step
            ),
        )
        together = job.sync.offsets == "together"
        sends = send_steps(plan.inner_steps - num_silent, len(job.layout.fragments), together)
        began_s = self._now_s()
        for step in loop:
            self.link.progress = {"round": plan.round + 1, "step": step, "steps": plan.inner_steps}
            self.on_step(plan)
            yield "step"
            self._inner_s += self._now_s() - began_s
            self.link.check(plan)
            self._num_steps += 1
            if step == plan.inner_steps:
                self._finish(plan, step)
            for fragment, at in zip(job.layout.fragments, sends):
                if step == num_silent + at:
                    yield from self._send(plan, fragment, loop)
            if step == plan.inner_steps:
                self.link.plan = None
            yield from self._merge(plan)
            if not self._waits:
                self.link.poll()
            began_s = self._now_s()

    def _seed_dropout(self, plan: InnerPlan) -> None:
        """And all else that is random in a model. Not by torch.manual_seed, which seeks out every kind of device."""
        who = f"{plan.island}/{self._gang.rank}" if self._gang and self._gang.rank else plan.island
        seed = _seed(self.job.seed, who, plan.round)
        torch.default_generator.manual_seed(seed)
        if self._tensors and next(iter(self._tensors.values())).is_cuda:
            torch.cuda.manual_seed_all(seed)

    def _begin_afresh(self, plan: InnerPlan) -> Iterator[Moment]:
        """From the global model, with the optimizer's state at the start of this round if there is a checkpoint."""
        yield from self._wait_until(partial(self._may_begin_afresh, plan), plan)
        self._due.clear()
        self._corrections = []
        outer, uplink = self.job.outer, get_codec(self.job.sync.uplink)
        for fragment in self.job.layout.fragments:
            self.link.aim(fragment.index, None)
            yield from self._wait_until(partial(self.link.is_encoded, fragment.index), plan)
            self._take(fragment.index, mixing=0.0)
        if self.job.sync.eager:
            sizes = [base.numel() for base in self.link.base]
            self._corrections = [EagerCorrection(size, outer.build(), uplink) for size in sizes]
        self._load_optimizer(plan.first_round)

    def _may_begin_afresh(self, plan: InnerPlan) -> bool:
        """Where islands go in step, whoever holds work ahead of an open round waits for what its own begins with."""
        fragments = range(len(self.job.layout.fragments) if self.job.sync.closes == "all" else 0)
        before = plan.first_round - 1
        return self.link.index >= plan.base_index and all(self.link.has_closed(p, before) for p in fragments)

    def _finish(self, plan: InnerPlan, num_steps: int) -> None:
        """The inner loop is done; what is saved is there before the contribution that closes the round is sent."""
        if self._own_steps is not None:
            self._own_steps += num_steps
        self._stands_at = plan.round + 1
        if self._stands_at % self.job.inner.checkpoint_every_rounds == 0:
            began_s = self._now_s()
            self._checkpoints.save(self._stands_at, self._optimizer, self._own_steps)
            self._saving_s += self._now_s() - began_s

    def _save_residuals(self, plan: InnerPlan, fragment: int) -> None:
        if self.link.residuals and fragment == len(self.job.layout.fragments) - 1:
            self._checkpoints.save_residuals(plan.round + 1, self.link.residuals)

    def _abandon(self, plan: InnerPlan) -> Iterator[Moment]:
        """A round that does not count leaves no trace."""
        self.link.abandon(plan)
        for fragment in self.job.layout.fragments:  # while one is encoded, its residual is written
            yield from self._wait_until(partial(self.link.is_encoded, fragment.index), None)
        self._checkpoints.delete(plan.round + 1)
        self._stands_at = -1

    # ---- between two inner steps ----

    def _send(self, plan: InnerPlan, fragment: Fragment, loop: InnerLoop) -> Iterator[Moment]:
        """A fragment whose round was closed meanwhile, without this island, is only merged."""
        p, exchange = fragment.index, self.link
        yield from self._wait_until(partial(exchange.is_encoded, p), plan)
        if plan.silent_steps:  # measured from what the others agreed on meanwhile (DiLoCo, Algorithm 1, line 11)
            exchange.aim(p, plan.round - 1)
            yield from self._wait_until(partial(exchange.stands_at, p, plan.round), plan)
        if not exchange.has_closed(p, plan.round):
            steps = self._num_steps - self._merged_at[p]
            exchange.post(plan, fragment, self._tensors, steps, self._metrics(fragment, loop))
            if self._corrections:
                yield from self._wait_until(partial(exchange.is_encoded, p), plan)
                payload = exchange.payload_of(plan, p)
                if payload is not None:
                    self._corrections[p].step_(payload, plan.num_islands)
        is_first = not any(due.fragment == p for due in self._due)
        if self._waits:
            self._due.append(_Due(self._num_steps + self.job.sync.overlap, p, plan.round))
        if is_first:
            exchange.aim(p, plan.round)
            if self._corrections:
                self._take(p, self.job.sync.mixing)  # one's own part at once, though nothing has come from the others

    def _merge(self, plan: InnerPlan) -> Iterator[Moment]:
        while self._due and self._due[0].at <= self._num_steps:
            due = self._due[0]
            yield from self._wait_until(partial(self.link.is_settled, due.fragment, due.round), plan)
            self._due.popleft()
            self._take(due.fragment, self.job.sync.mixing)
            following = [later.round for later in self._due if later.fragment == due.fragment]
            self.link.aim(due.fragment, following[0] if following else None)
        if not self._waits:
            for p in self.link.arrived():
                self._take(p, self.job.sync.mixing)

    def _take(self, p: int, mixing: float) -> None:
        """theta <- alpha theta + (1 - alpha) Theta of one fragment; Theta is what the next round is measured from."""
        base = self.link.fetch(p)
        if self._corrections:
            self._corrections[p].add_to_(base)
        merge_(self._held[p], self._spread(p, base), self._tensors, mixing)
        self._merged_at[p] = self._num_steps

    def _metrics(self, fragment: Fragment, loop: InnerLoop) -> dict[str, float]:
        """Seconds are those since a lease was last closed; what only the accelerator knows is asked for once a plan."""
        now_s, tokens = self._now_s(), float(loop.num_tokens)
        sync_s = max(0.0, now_s - self._told_s - self._inner_s - self._saving_s)
        metrics = {"inner_seconds": self._inner_s, "sync_wait_seconds": sync_s, "tokens": tokens}
        if fragment.index != len(self.job.layout.fragments) - 1:
            return metrics
        result = loop.result()
        speed = tokens / max(self._inner_s, 1e-9)
        self.link.progress = {**self.link.progress, "loss": result.loss, "tokens_per_s": speed}
        self._inner_s, self._saving_s, self._told_s = 0.0, 0.0, now_s
        return {**metrics, "loss": result.loss, "gradient_norm": result.gradient_norm}

    # ---- the inner optimizer ----

    def _new_optimizer(self) -> None:
        self._optimizer = build_inner_optimizer(self.job.inner, self._tensors)

    def _load_optimizer(self, round: int) -> None:
        """State at the start of this round, or the newest older one; without any, a joiner's ramp (none in round 0)."""
        self._new_optimizer()
        loaded = self._checkpoints.load_(round, self._optimizer)
        if self._gang and not self._gang.all_equal(loaded, "checkpoint"):  # ranks of one mind, or none remembers
            loaded = None
            self._new_optimizer()
        self._checkpoints.load_residuals_(round, self.link.residuals)
        self._own_steps = loaded[1] if loaded else (0 if round else None)


def _seed(seed: int, island: str, round: int) -> int:
    """Of dropout and the like: the same for a round that is repeated."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{island}/{round}".encode()).digest()[:8], "little") >> 1
