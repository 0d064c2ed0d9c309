"""The life of one island: DiLoCo (arXiv 2311.08105), Algorithm 1, as one worker sees it.

    fetch the base - run H inner steps - subtract - submit        (lines 4-8 and 11)

The inner optimizer's state stays here: never sent, never reset at a round's end. The island takes turns with the
world: one `turn` follows the log and, where there is a plan, does one round of it.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.algorithm.fragments import Fragment, Layout
from diloco_ray.algorithm.outer_gradient import OuterGradientStats, encode_outer_gradient_
from diloco_ray.algorithm.replica import Replica
from diloco_ray.algorithm.settings import OuterSettings
from diloco_ray.coordination.messages import Contribution, InnerPlan
from diloco_ray.data.batches import batches
from diloco_ray.data.settings import DataSettings
from diloco_ray.data.shards import TokenShards
from diloco_ray.errors import ClusterError, FencedError
from diloco_ray.ids import sha256_hex
from diloco_ray.island.checkpoint import IslandCheckpoints
from diloco_ray.island.inner_loop import InnerResult, run_inner_steps
from diloco_ray.island.inner_optimizer import build_inner_optimizer, learning_rate_at
from diloco_ray.island.settings import InnerSettings
from diloco_ray.log.run_store import RunStore
from diloco_ray.model.build import build_model, trainable_parameters
from diloco_ray.model.settings import ModelSettings
from diloco_ray.transport.follower import Follower
from diloco_ray.transport.protocol import Hello, Transport


@dataclass(frozen=True)
class IslandJob:
    """What every island of a run is told, once."""

    run_id: str
    seed: int
    num_inner_steps: int  # horizon of the learning-rate schedule
    layout: Layout
    data: DataSettings
    prepared_url: str
    model: ModelSettings
    inner: InnerSettings
    outer: OuterSettings
    uplink: str
    downlink: str
    checkpoints_url: str  # each island has a folder of its own in it


@dataclass(frozen=True)
class Identity:
    """One process that holds an island's name."""

    island: str
    process: str
    pid: int
    node: str


class RoundAbandonedError(Exception):
    """Raised between two inner steps: the plan in hand is no longer awaited."""


class Island:
    """One island. Not thread safe but for `say_hello` and the attributes that a heart reads."""

    def __init__(self, job: IslandJob, identity: Identity, transport: Transport):
        if job.inner.threads is not None:
            torch.set_num_threads(job.inner.threads)
        self.job, self.identity, self.transport = job, identity, transport
        self.incarnation = 0
        self.plan: InnerPlan | None = None  # the work in hand
        self.progress: dict[str, float] = {}
        self.on_step: Callable[[int], None] = lambda step: None  # may raise to abandon the round
        shards = TokenShards.open(job.prepared_url)
        self._train = shards.split("train")
        self._model = build_model(
            job.model,
            seed=job.seed,
            vocab_size=shards.manifest.vocab_size,
            eos_token_id=shards.manifest.eos_token_id,
        ).to(pick_device(job.inner.device))
        self._tensors = trainable_parameters(self._model)
        if job.inner.compile:
            self._model.compile()
        self._uplink = get_codec(job.uplink)
        replica = Replica(job.layout, job.outer.build(), get_codec(job.downlink))
        self._follower = Follower(replica, transport)
        self._flat = torch.empty(max(fragment.num_values for fragment in job.layout.fragments))
        self._checkpoints = IslandCheckpoints(RunStore(f"{job.checkpoints_url}/{identity.island}"), job.run_id)
        self._new_optimizer()
        self._optimizer_round = -1  # the round at whose start the optimizer stands; -1: nothing loaded yet
        self._own_steps: int | None = None
        self._sent: list[tuple[Contribution, np.ndarray]] = []  # ours until their records are committed (I3)
        self._sent_plan: InnerPlan | None = None
        self._said_hello = False
        self._done_lease = ""
        self._idle_since_s = time.monotonic()  # end of the last inner loop: from then on it waits, encodes, merges
        self._sync_wait_s = 0.0

    def say_hello(self) -> None:
        """Takes or keeps the name; raises FencedError where another process holds it."""
        who, held = self.identity, self.plan or self._sent_plan
        welcome = self.transport.join(Hello(who.island, who.process, who.pid, who.node, self.incarnation, held))
        if welcome.problem:
            raise FencedError(welcome.problem, where=who.island, remedy="look at the run's events for the reason")
        self.incarnation, self._said_hello = welcome.incarnation, True

    def start(self) -> None:
        self.say_hello()
        self._follower.load_snapshot()
        self._idle_since_s = time.monotonic()

    def turn(self, wait_s: float) -> bool:
        """Follows the log for up to wait_s and does the work there is. False when the run is over."""
        wait_s = 0.0 if self._said_hello else wait_s  # there may be something to send again at once
        news = self.transport.follow(
            self.identity.island, self.incarnation, self._follower.index, wait_s, self._done_lease
        )
        match news.standing:
            case "over":
                return False
            case "fenced":
                raise FencedError(news.reason or "another process took this island's name", where=self.identity.island)
            case "rejoin":
                self.say_hello()
                return True
            case "ok":
                pass
        self._follower.replay(news.records)
        self._forget_what_is_final()
        if self._said_hello:
            self._send_again()
        plan = news.plan
        if plan and plan.lease_id != self._done_lease and plan.base_index <= self._follower.index:
            self._work(plan)
        return True

    def _send_again(self) -> None:
        """A restarted coordinator has lost what its predecessor had accepted and not committed."""
        self._said_hello = False
        for contribution, payload in self._sent:
            self._submit(contribution, payload)

    def _forget_what_is_final(self) -> None:
        versions = self._follower.replica.versions
        self._sent = [(c, payload) for c, payload in self._sent if versions[c.fragment] <= c.base_version]
        if not self._sent:
            self._sent_plan = None

    # ---- one round ----

    def _work(self, plan: InnerPlan) -> None:
        self.plan, self._sent = plan, []
        self._sync_wait_s = time.monotonic() - self._idle_since_s
        try:
            self._fetch_base(plan)
            result = self._run_inner_steps(plan)
            self._idle_since_s = time.monotonic()
            if (plan.round + 1) % self.job.inner.checkpoint_every_rounds == 0:
                self._checkpoints.save(plan.round + 1, self._optimizer, self._own_steps)
            verdicts = [self._subtract_and_submit(plan, fragment, result) for fragment in self._open_fragments(plan)]
            kept = all(verdicts)
        except RoundAbandonedError:
            kept = False
        if not kept:  # a round that does not count leaves no trace
            self._checkpoints.delete(plan.round + 1)
            self._optimizer_round = -1
            self._sent = []
        self._sent_plan = plan if kept else None
        self._done_lease, self.plan = plan.lease_id, None

    def _fetch_base(self, plan: InnerPlan) -> None:
        self._follower.replica.write_to_(self._tensors)
        if self._optimizer_round != plan.round:
            self._load_optimizer(plan.round)
        torch.manual_seed(_seed(self.job.seed, plan.island, plan.round))

    def _open_fragments(self, plan: InnerPlan) -> list[Fragment]:
        """Those that still await the round's outer step: in a round that is repeated some may have taken it."""
        versions = self._follower.replica.versions
        return [fragment for fragment in self.job.layout.fragments if versions[fragment.index] == plan.base_version]

    def _run_inner_steps(self, plan: InnerPlan) -> InnerResult:
        job, own = self.job, self._own_steps

        def on_step(done: int) -> None:
            self.progress = {"round": plan.round + 1, "step": done, "steps": plan.inner_steps}
            self.on_step(done)

        result = run_inner_steps(
            self._model,
            self._optimizer,
            batches(self._train, plan.ranges, job.inner.batch_size, job.data.sequence_length, job.seed),
            job.inner,
            learning_rate=lambda step: learning_rate_at(
                job.inner, plan.first_inner_step + step, job.num_inner_steps, None if own is None else own + step
            ),
            on_step=on_step,
        )
        if own is not None:
            self._own_steps = own + result.num_steps
        self._optimizer_round = plan.round + 1
        self.progress = {
            "round": plan.round + 1,
            "step": plan.inner_steps,
            "steps": plan.inner_steps,
            "loss": result.loss,
            "tokens_per_s": result.num_tokens / max(result.seconds, 1e-9),
        }
        return result

    def _subtract_and_submit(self, plan: InnerPlan, fragment: Fragment, result: InnerResult) -> bool:
        """Sends Q(base - island) of one fragment; whether it was taken."""
        island = self._flat[: fragment.num_values]
        fragment.gather_(self._tensors, island)
        payload = torch.empty(self._uplink.num_bytes(fragment.num_values), dtype=torch.uint8)
        base = self._follower.replica.parameters(fragment.index)
        stats = encode_outer_gradient_(base, island, self._uplink, payload)
        contribution = self._header(plan, fragment, payload.numpy(), result, stats)
        self._sent.append((contribution, payload.numpy()))
        return self._submit(contribution, payload.numpy())

    def _header(
        self, plan: InnerPlan, fragment: Fragment, payload: np.ndarray, result: InnerResult, stats: OuterGradientStats
    ) -> Contribution:
        return Contribution(
            run_id=self.job.run_id,
            island=plan.island,
            incarnation=self.incarnation,
            fragment=fragment.index,
            base_version=plan.base_version,
            lease_id=plan.lease_id,
            codec=self._uplink.name,
            payload_sha256=sha256_hex(payload.data),
            payload_bytes=payload.size,
            metrics={
                "loss": result.loss,
                "gradient_norm": result.gradient_norm,
                "inner_seconds": result.seconds,
                "sync_wait_seconds": self._sync_wait_s,
                "tokens": float(result.num_tokens),
                "norm": stats.norm,
                "relative_error": stats.relative_error,
            },
        )

    def _submit(self, contribution: Contribution, payload: np.ndarray) -> bool:
        for _ in range(10):
            verdict = self.transport.submit(contribution, payload)
            if verdict.status != "unknown":
                return verdict.status in ("accepted", "committed")
            self.say_hello()  # a restarted coordinator knows us again and awaits this very contribution
        raise ClusterError("the coordinator forgot this island ten times in a row", where=contribution.island)

    # ---- the inner optimizer ----

    def _new_optimizer(self) -> None:
        self._optimizer = build_inner_optimizer(self.job.inner, self._tensors)

    def _load_optimizer(self, round: int) -> None:
        """State at the start of this round, or the newest older one; without any, a joiner's ramp (none in round 0)."""
        self._new_optimizer()
        loaded = self._checkpoints.load_(round, self._optimizer)
        self._own_steps = loaded[1] if loaded else (0 if round else None)
        self._optimizer_round = round


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _seed(seed: int, island: str, round: int) -> int:
    """Of dropout and the like: the same for a round that is repeated."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{island}/{round}".encode()).digest()[:8], "little") >> 1
