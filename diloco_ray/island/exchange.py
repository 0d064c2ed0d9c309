"""An island's side of the exchange: what it sends, what it hears, and the replica that follows the log.

    training thread:   post -> (inner steps) -> is_settled -> fetch
    sending thread:    encode, submit
    listening thread:  follow the log, replay into the replica

so that communication hides behind inner steps. Where there are no threads (`start_threads` was not called) `post` sends
at once and `poll` listens: the same exchange in one process, one island after the other.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.algorithm.fragments import Fragment
from diloco_ray.algorithm.replica import Replica
from diloco_ray.coordination.messages import Contribution, InnerPlan
from diloco_ray.errors import ClusterError
from diloco_ray.island.handover import Bell, Plans
from diloco_ray.island.job import Identity, IslandJob, RoundAbandonedError, RunOverError, fenced
from diloco_ray.island.outbox import Fates, Outbox, Outgoing
from diloco_ray.island.threads import Mailbox, OsThreads, Threads, start_thread
from diloco_ray.transport.follower import Follower
from diloco_ray.transport.protocol import Beat, Hello, Transport


class Exchange:
    """Between one island and the coordinator. `plan` and `progress` are what the heart tells."""

    def __init__(self, job: IslandJob, identity: Identity, transport: Transport, threads: Threads | None = None):
        self.job, self.identity, self.transport = job, identity, transport
        self.incarnation = 0
        self.progress: dict[str, float] = {}
        self.over = self.is_waiting = self._said_hello = False
        self.on_encoded: Callable[[InnerPlan, int], None] = lambda plan, fragment: None  # called before it is submitted
        self._in_step = job.sync.closes == "all"
        self._follower = Follower(Replica(job.layout, job.outer.build(), get_codec(job.sync.downlink)), transport)
        sizes = [fragment.num_values for fragment in job.layout.fragments]
        self.base = [torch.empty(size) for size in sizes]  # what outer gradients are measured from
        self.base_versions = [0 for _ in sizes]
        self._targets: list[int | None] = [None for _ in sizes]  # versions to replay to; None: the newest
        self._plans, self._outbox, self._fates = Plans(), Outbox(job), Fates(job, identity.island)
        self.residuals = self._outbox.residuals
        self._error: Exception | None = None
        self._threads, self._has_threads, self._is_sending = threads or OsThreads(), False, False
        self._hello, self.bell = self._threads.condition(), Bell(self._threads)
        self._posted: Mailbox[Outgoing | None] = Mailbox(self._threads)

    @property
    def plan(self) -> InnerPlan | None:
        """The work in hand: inner steps are to be taken."""
        return self._plans.in_hand

    @plan.setter
    def plan(self, plan: InnerPlan | None) -> None:
        self._plans.in_hand = plan

    # ---- its life ----

    def say_hello(self) -> None:
        """Takes or keeps the name; raises FencedError where another process holds it."""
        with self._hello:
            if self.over:
                return
            with self.bell:
                who, held = self.identity, self._plans.held(self._outbox.plans)
            welcome = self.transport.join(Hello(who.island, who.process, who.pid, who.node, self.incarnation, held))
            if welcome.problem:
                raise fenced(who.island, welcome.problem)
            self.incarnation, self._said_hello = welcome.incarnation, True

    def start(self) -> None:
        if not self.incarnation:
            self.say_hello()
        self._fates.begin(self._follower.load_snapshot().versions)
        self.listen(0.0)

    def start_threads(self, follow_s: float) -> None:
        """follow_s: length of one long poll."""
        self._has_threads = self._is_sending = True
        start_thread(self._threads, "send", self._send_on, self.fail)
        start_thread(self._threads, "listen", lambda: self._listen_on(follow_s), self.fail)

    def stop(self, settle_s: float = 0.0) -> None:
        """What is posted may be sent and answered in this time. Whoever stops says no hello any more."""
        self._posted.put(None)
        until_s = self._threads.now_s() + settle_s
        while self._is_sending and (left_s := until_s - self._threads.now_s()) > 0:
            self.bell.wait(left_s)
        with self._hello:  # one under way comes before the farewell
            self.over = True

    def fail(self, error: Exception) -> None:
        """Ends the island, on its training thread."""
        with self.bell.ringing():
            self._error = error

    def _send_on(self) -> None:
        try:
            while (item := self._posted.get()) is not None:
                self._deliver(item)
        finally:
            with self.bell.ringing():
                self._is_sending = False

    def _listen_on(self, follow_s: float) -> None:
        while not self.over:
            self.listen(follow_s)

    def wait(self, timeout_s: float) -> None:
        """Until something has changed since the last wait. Only with threads."""
        self.is_waiting = True
        self.bell.wait(timeout_s)
        self.is_waiting = False

    def poll(self) -> None:
        if not self._has_threads:
            self.listen(0.0)

    def check(self, plan: InnerPlan | None = None) -> None:
        """Raises what ends the work on this plan, or all work."""
        if self._error:
            raise self._error
        if self.over:
            raise RunOverError
        if plan and plan.lease_id in self._plans.void:
            raise RoundAbandonedError

    def void(self, lease_id: str) -> None:
        with self.bell.ringing():
            self._plans.void.add(lease_id)

    # ---- plans ----

    def next_plan(self) -> InnerPlan | None:
        self.check()
        with self.bell:
            return self._plans.take()

    def abandon(self, plan: InnerPlan) -> None:
        """Nothing more of this plan is to be sent; what is being encoded stays until it is."""
        with self.bell:
            self._plans.void.add(plan.lease_id)
            self._outbox.drop(lambda item: item.plan.lease_id in self._plans.void and item.contribution is not None)
            self.plan = None

    # ---- sending ----

    def post(
        self,
        plan: InnerPlan,
        fragment: Fragment,
        tensors: Mapping[str, Tensor],
        inner_steps: int,
        metrics: Mapping[str, float],
    ) -> None:
        """Sends Q(base - island) of one fragment. inner_steps: since the fragment was last merged."""
        with self.bell:
            base_version = self.base_versions[fragment.index]
            item = self._outbox.add(plan, fragment, base_version, tensors, inner_steps, metrics)
        (self._posted.put if self._has_threads else self._deliver)(item)

    def payload_of(self, plan: InnerPlan, fragment: int) -> Tensor | None:
        """The encoded contribution; None while it is being encoded, or if there is none."""
        with self.bell:
            return self._outbox.payload_of(plan, fragment)

    def is_encoded(self, fragment: int) -> bool:
        """Whether `fetch` may overwrite the fragment's base, and `post` its values."""
        with self.bell:
            return self._outbox.is_encoded(fragment)

    def _deliver(self, item: Outgoing) -> None:
        contribution, payload = self._encode(item)
        self.on_encoded(item.plan, item.fragment.index)
        with self.bell.ringing():
            item.contribution, item.payload = contribution, payload.numpy()
            if item.plan.lease_id in self._plans.void:
                self._outbox.drop(lambda other: other is item)
                return
        self._submit(item, contribution)

    def _encode(self, item: Outgoing) -> tuple[Contribution, Tensor]:
        p = item.fragment.index
        if self.job.sync.anchor == "base" and not item.plan.silent_steps:
            return self._outbox.encode(item, self.base[p], item.base_version, self.incarnation)
        with self.bell:  # the replica stands still
            replica = self._follower.replica
            return self._outbox.encode(item, replica.parameters(p), replica.versions[p], self.incarnation)

    def _submit(self, item: Outgoing, contribution: Contribution) -> None:
        for _ in range(10):
            verdict = self.transport.submit(contribution, item.payload)
            item.was_sent_back = verdict.status == "full"
            if verdict.status == "rejected":
                self._refused(item)
            if verdict.status == "committed":
                self._fates.told(item)
            if verdict.status != "unknown":
                return
            self.say_hello()  # a restarted coordinator knows us again and awaits this very contribution
        raise ClusterError("the coordinator forgot this island ten times in a row", where=contribution.island)

    def _refused(self, refused: Outgoing) -> None:
        """Nothing is awaited of it any more; or its whole plan is void, which the next beat would tell as well."""
        lease_id = refused.plan.lease_id
        beat = Beat(self.identity.island, self.incarnation, lease_id, dict(self.progress))
        order = "go_on" if self.over else self.transport.beat(beat)
        if order == "rejoin":
            return  # a restarted coordinator is sent it again, and judges for itself
        if order == "abandon":
            self.void(lease_id)
        with self.bell:
            self._outbox.drop(lambda item: item is refused)
            if order == "go_on":
                self._fates.told(refused)

    # ---- listening ----

    def listen(self, wait_s: float) -> None:
        words = self._fates.words  # they count when the records that they speak of have come
        wait_s = 0.0 if self._said_hello or words else wait_s  # there may be something to send again at once
        news = self.transport.follow(
            self.identity.island, self.incarnation, self._follower.index, wait_s, self._plans.newest_lease
        )
        match news.standing:
            case "over":
                with self.bell.ringing():
                    self.over = True
                return
            case "fenced":
                raise fenced(self.identity.island, news.reason)
            case "rejoin":
                self.say_hello()
                return
            case "ok":
                pass
        if news.records or news.plan or words:
            with self.bell.ringing():
                for record in self._follower.receive(news.records):
                    self._fates.read(record)
                    self._follower.replay(record.fragment, self._targets[record.fragment])
                if not news.records:
                    self._fates.believe(words)
                self._outbox.drop(lambda item: bool(item.contribution) and self._fates.are_known(*item.key))
                if news.plan:
                    self._plans.receive(news.plan, self._outbox.plans)
        self._send_again()

    def _send_again(self) -> None:
        """What the coordinator had no room for. A restarted one has lost all that is accepted and not committed."""
        is_restarted, self._said_hello = self._said_hello, False
        with self.bell:
            items = [item for item in self._outbox.items if is_restarted or item.was_sent_back]
        for item in items:
            if item.contribution:
                self._submit(item, item.contribution)

    # ---- merging ----

    @property
    def index(self) -> int:
        return self._follower.index

    def has_closed(self, fragment: int, round: int) -> bool:
        """Whether a contribution to this round would come too late, or has come from an earlier life of this island."""
        with self.bell:
            return self._fates.are_known(fragment, round)

    def aim(self, fragment: int, round: int | None) -> None:
        """What the fragment is merged with next is the outer step of this round: no later one is replayed before."""
        with self.bell:
            self._targets[fragment] = round + 1 if self._in_step and round is not None else None
            self._follower.replay(fragment, self._targets[fragment])

    def stands_at(self, fragment: int, version: int) -> bool:
        """Whether the replica has replayed the fragment up to this version."""
        with self.bell:
            return self._follower.replica.versions[fragment] >= version

    def is_settled(self, fragment: int, round: int) -> bool:
        """Whether the outer step that this round's contribution went into, or came too late for, is at hand."""
        with self.bell:
            replayed = self._follower.replica.versions[fragment] > round or not self._in_step
            return replayed and self._fates.are_known(fragment, round) and self.is_encoded(fragment)

    def arrived(self) -> list[int]:
        """Fragments that have moved on since they were fetched."""
        with self.bell:
            versions = self._follower.replica.versions
            return [p for p, v in enumerate(self.base_versions) if versions[p] > v and self.is_encoded(p)]

    def fetch(self, fragment: int) -> Tensor:
        """The global parameters of one fragment, (num_values,) float32, as the new base: ours to add to."""
        with self.bell:
            self.base[fragment].copy_(self._follower.replica.parameters(fragment))
            self.base_versions[fragment] = self._follower.replica.versions[fragment]
        return self.base[fragment]
