"""The coordinator's decisions: `reduce(state, event) -> (state, commands)`, a pure function.

Every live island has an `InnerPlan` (steps, leased data); its contributions are admitted; when a fragment has those
that its outer step waits for, the step is taken and committed. What is waited for, and who works on what meanwhile,
is all that the presets differ in: see `plans` and `rounds`. Islands that join in an open round start with the next,
unless the round has too few without them.
"""

from dataclasses import replace
from typing import assert_never

from diloco_ray.coordination import membership
from diloco_ray.coordination.admission import (
    is_outdated,
    judge_header,
    judge_norm,
    lack_of_room,
    plan_of,
    refuse,
    schema_problem,
)
from diloco_ray.coordination.claims import take_up
from diloco_ray.coordination.membership import STRIKES_TO_QUARANTINE, Member, with_member
from diloco_ray.coordination.messages import (
    Answer,
    Command,
    Committed,
    Contribution,
    Event,
    Heartbeat,
    Inspect,
    Inspected,
    Joined,
    Left,
    Lost,
    Note,
    Submitted,
    Tick,
    Verdict,
)
from diloco_ray.coordination.plans import Step, hand_out_work, issue_plans, revoke, void, watch_the_wait
from diloco_ray.coordination.rounds import close_fragments, committed
from diloco_ray.coordination.state import Accepted, RunState, ended

MAX_TOLD = 20  # decisions on an island's own words
MAX_LETTERS = 1000  # of a text of its own


def reduce(state: RunState, event: Event) -> Step:
    """The next state and what to do in the world. Total: no event in any state raises."""
    if ended(state) and isinstance(event, Inspected | Committed | Tick):
        return state, []
    before = state
    match event:
        case Joined():
            state, commands = _joined(state, event)
        case Heartbeat():
            state, commands = _heartbeat(state, event)
        case Lost():
            member = state.members.get(event.island)
            ours = member is not None and event.process in ("", member.process)
            state, commands = _gone(state, event.island, "lost", event.reason) if ours else (state, [])
        case Left():
            current = membership.is_current(state.members, event.island, event.incarnation)
            state, commands = _gone(state, event.island, "left", event.reason) if current else (state, [])
        case Submitted():
            state, commands = _submitted(state, event)
        case Inspected():
            state, commands = _inspected(state, event)
        case Committed():
            state, commands = committed(state, event)
        case Tick():
            state, commands = _tick(state, event.now_s)
        case _:
            assert_never(event)
    state, commands = _told(before, state, _own_word_of(before, event), commands)
    for go_on in (hand_out_work, close_fragments, watch_the_wait):
        state, more = go_on(state, event.now_s)
        commands += more
    return state, commands


def _own_word_of(state: RunState, event: Event) -> str:
    """The island that may say this as often as it likes, and by itself; "" for what else happens."""
    match event:
        case Submitted():
            return event.contribution.island
        case Left():
            return event.island
        case Joined():
            known = state.members.get(event.island)
            return event.island if known and known.standing in ("alive", "left", "quarantined") else ""
        case _:
            return ""


def _told(before: RunState, state: RunState, island: str, commands: list[Command]) -> Step:
    """People are told what an island's words lead to, but not for ever: `MAX_TOLD` times, and once more for each round.

    Always that they have cost it its place. What a stranger says, who never said hello, is between it and the answer
    that it gets.
    """
    num_notes, member = sum(isinstance(command, Note) for command in commands), state.members.get(island)
    is_put_out = member is not None and member.standing == "quarantined" and member is not before.members.get(island)
    if not island or not num_notes or is_put_out:
        return state, commands
    told = state.told.get(island, 0) if member else MAX_TOLD
    after = min(MAX_TOLD, told + num_notes)
    kept, room = list[Command](), after - told
    for command in commands:
        is_note = isinstance(command, Note)
        if room or not is_note:
            kept.append(command)
        room -= is_note and room > 0
    if told == after:
        return state, kept
    if after == MAX_TOLD:
        kept.append(Note(f"{island} says much; what comes of it is told again when another round is done"))
    return replace(state, told={**state.told, island: after}), kept


# ---- membership ----


def _joined(state: RunState, event: Joined) -> Step:
    known = state.members.get(event.island, Member(event.island, "absent"))
    if known.standing == "quarantined":
        return state, [Note(f"{event.island} asked to join and is quarantined: {known.reason}")]
    if membership.is_superseded(known, event.process, event.incarnation):
        return state, [Note(f"an older process of {event.island} (incarnation {event.incarnation}) is fenced")]
    commands: list[Command] = []
    if known.standing == "alive" and known.process != event.process:
        state, commands = _gone(state, event.island, "lost", "another process took its name")
    member = membership.admit(
        known,
        now_s=event.now_s,
        process=event.process,
        incarnation=event.incarnation,
        pid=event.pid,
        node=event.node[:MAX_LETTERS],
    )
    state = replace(state, members=with_member(state.members, member))
    commands.append(Note(f"{event.island} joined (incarnation {member.incarnation}, pid {event.pid} on {member.node})"))
    state, more = take_up(state, event.island, event.held)
    return state, commands + more


def _heartbeat(state: RunState, event: Heartbeat) -> Step:
    if not membership.is_current(state.members, event.island, event.incarnation):
        return state, []
    member = state.members[event.island]
    told = membership.plausible(event.progress, membership.PROGRESS)
    member = replace(member, last_seen_s=event.now_s, progress={**member.progress, **told})
    return replace(state, members=with_member(state.members, member)), []


def _gone(state: RunState, island: str, standing: membership.Standing, reason: str) -> Step:
    """Its open work expires; what the coordinator has accepted from it stays."""
    member, reason = state.members[island], reason[:MAX_LETTERS]
    if member.standing not in ("alive", "expected"):
        return state, []
    members = with_member(state.members, replace(member, standing=standing, reason=reason))
    state = revoke(replace(state, members=members, pace=state.pace.forgotten(island)), island, "expired")
    return state, [Note(f"{island} {standing}: {reason}")]


# ---- contributions ----


def _submitted(state: RunState, event: Submitted) -> Step:
    c = event.contribution
    c = replace(c, metrics=membership.plausible(c.metrics, membership.METRICS))
    verdict = judge_header(state, c)
    if plan_of(state, c) and membership.is_current(state.members, c.island, c.incarnation):
        state = replace(state, offered=state.offered | {c.island})
    if verdict is None:
        return _awaited(state, c)
    if verdict.status in ("accepted", "pending") and plan_of(state, c):
        inbox = {**state.inbox, c.key: replace(state.inbox[c.key], again=c.lease_id)}
        state = replace(state, inbox=inbox)
    if is_outdated(state, c, verdict):
        state = void(state, c.island, "expired")
    commands: list[Command] = [] if verdict.status == "pending" else [Answer(c, verdict)]
    if verdict.status == "rejected":
        commands.append(Note(f"{c.island}: contribution to fragment {c.fragment} rejected: {verdict.reason}"))
    return state, commands


def _awaited(state: RunState, c: Contribution) -> Step:
    """Has the payload inspected, unless the header already shows that it cannot be right, or there is no room."""
    if problem := schema_problem(state.rules, c):
        return _strike(state, c, problem)
    if lack := lack_of_room(state, c):
        is_news = c.key not in state.sent_back
        note = [Note(f"{c.island}: contribution to fragment {c.fragment}, round {c.round + 1}, waits: {lack}")]
        return replace(state, sent_back=state.sent_back | {c.key}), [Answer(c, Verdict("full", lack)), *note * is_news]
    plan = plan_of(state, c)
    accepted = Accepted(c, state.ledger.outstanding[c.lease_id], plan.inner_steps if plan else 1)
    inbox, sent_back = {**state.inbox, c.key: accepted}, state.sent_back - {c.key}
    return replace(state, inbox=inbox, sent_back=sent_back), [Inspect(c)]


def _inspected(state: RunState, event: Inspected) -> Step:
    c = event.contribution
    held = state.inbox.get(c.key)
    if held is None or held.contribution.payload_sha256 != c.payload_sha256 or held.norm is not None:
        # Not what is being inspected now: its island was lost meanwhile, or the answer came twice.
        return state, [Answer(c, judge_header(state, c) or Verdict("unknown"))]
    verdict = refuse(event.problem) if event.problem else judge_norm(state, held, event.norm)
    if verdict.status == "rejected":
        return _strike(state, c, verdict.reason)
    accepted = replace(held, norm=event.norm, accepted_s=event.now_s)
    inbox, pace = {**state.inbox, c.key: accepted}, state.pace.stepped(c.island, _step_s(state, c))
    return replace(state, inbox=inbox, pace=pace), [Answer(c, verdict)]


def _step_s(state: RunState, c: Contribution) -> float:
    """Of one inner step, by the island's word. With a quorum, whatever else it does between two contributions counts:
    outer steps are to come no more often than they do."""
    tokens_per_step = state.rules.sequences_per_inner_step * state.ledger.tokens_per_sequence
    seconds = c.metrics.get("inner_seconds", 0.0)
    if state.rules.closes == "quorum":
        seconds += c.metrics.get("sync_wait_seconds", 0.0)
    return seconds / max(1.0, c.metrics.get("tokens", 0.0) / tokens_per_step)


def _strike(state: RunState, c: Contribution, reason: str) -> Step:
    """A bad payload costs the island the work it has in hand; the third in a row costs it its place."""
    state = void(state, c.island, "rejected")
    member = state.members[c.island]
    member = replace(member, strikes=member.strikes + 1)
    state = replace(state, members=with_member(state.members, member))
    commands: list[Command] = [
        Answer(c, refuse(reason)),
        Note(f"{c.island}: contribution rejected (strike {member.strikes}): {reason}"),
    ]
    if member.strikes >= STRIKES_TO_QUARANTINE:
        state, more = _gone(state, c.island, "quarantined", reason)
        return state, commands + more
    # The same data once more: where islands go in step, the others wait for it in this round.
    return (issue_plans(state, [c.island]) if not state.open_plans(c.island) else state), commands


# ---- time ----


def _tick(state: RunState, now_s: float) -> Step:
    commands: list[Command] = []
    for member in membership.overdue(state.members, now_s=now_s):
        absent = replace(member, standing="absent", reason="did not join in time")
        state = replace(state, members=with_member(state.members, absent))
        commands.append(Note(f"{member.name} did not join in time; going on without it"))
    timeout_s = state.rules.heartbeat_timeout_s
    for member in membership.silent_since(state.members, now_s=now_s, timeout_s=timeout_s):
        state, more = _gone(state, member.name, "lost", f"silent for {now_s - member.last_seen_s:.0f} s")
        commands += more
    return state, commands
