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
from diloco_ray.coordination.membership import STRIKES_TO_QUARANTINE, Member, with_member
from diloco_ray.coordination.messages import (
    Answer,
    Command,
    Committed,
    Contribution,
    Event,
    Heartbeat,
    InnerPlan,
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
from diloco_ray.coordination.plans import Step, hand_out_work, issue_plans, revoke, taking_part, void, watch_the_wait
from diloco_ray.coordination.rounds import close_fragments, committed
from diloco_ray.coordination.state import Accepted, RunState, ended


def reduce(state: RunState, event: Event) -> Step:
    """The next state and what to do in the world. Total: no event in any state raises."""
    if ended(state) and isinstance(event, Inspected | Committed | Tick):
        return state, []
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
    for go_on in (hand_out_work, close_fragments, watch_the_wait):
        state, more = go_on(state, event.now_s)
        commands += more
    return state, commands


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
        node=event.node,
    )
    state = replace(state, members=with_member(state.members, member))
    commands.append(Note(f"{event.island} joined (incarnation {member.incarnation}, pid {event.pid} on {event.node})"))
    held = {plan.lease_id for plan in event.held}
    for plan in event.held:
        if plan.lease_id not in {known.lease_id for known in state.plans.get(event.island, ())}:
            # Work that was given since, and that the island has yet to hear of, replaces what it holds.
            replaced = any(new.lease_id not in held for new in state.open_plans(event.island))
            state, more = _take_up(state, event.island, plan, replaced)
            commands += more
    return state, commands


def _take_up(state: RunState, island: str, held: InnerPlan, replaced: bool) -> Step:
    """An island that outlived the coordinator goes on with its work if nobody else has got its data.

    Work that follows on work that is void is void as well: nobody would do the rounds between.
    """
    rules, mine = state.rules, state.plans.get(island, ())
    following = state.num_plans.get(island, 0)
    if rules.in_step:
        following = mine[-1].round + 1 if mine else state.round
    fits = (
        not ended(state)
        and not replaced
        and held.island == island
        and membership.is_current(state.members, island, held.incarnation)
        and 0 <= held.silent_steps < held.inner_steps <= held.silent_steps + rules.inner_steps_per_round
        and held.first_round <= following <= held.round
        and (not rules.in_step or held.round < rules.num_rounds)
        and (not rules.in_step or len(taking_part(state, held.round)) < rules.islands_in(held.round))
        and sum(r.num_sequences for r in held.ranges) == held.inner_steps * rules.sequences_per_inner_step
    )
    ledger = state.ledger.adopt(held.lease_id, island, held.ranges) if fits else None
    if ledger is None:
        return state, [Note(f"{island}: work on round {held.round + 1} is void; it gets a new plan")]
    plans = {**state.plans, island: (*mine, held)}
    num_plans = {**state.num_plans, island: held.round + 1}
    state = replace(state, ledger=ledger, plans=plans, num_plans=num_plans)
    return state, [Note(f"{island} goes on with its work on round {held.round + 1}")]


def _heartbeat(state: RunState, event: Heartbeat) -> Step:
    if not membership.is_current(state.members, event.island, event.incarnation):
        return state, []
    member = state.members[event.island]
    told = {name: value for name, value in event.progress.items() if name in membership.PROGRESS}
    member = replace(member, last_seen_s=event.now_s, progress={**member.progress, **told})
    return replace(state, members=with_member(state.members, member)), []


def _gone(state: RunState, island: str, standing: membership.Standing, reason: str) -> Step:
    """Its open work expires; what the coordinator has accepted from it stays."""
    member = state.members[island]
    if member.standing not in ("alive", "expected"):
        return state, []
    members = with_member(state.members, replace(member, standing=standing, reason=reason))
    state = revoke(replace(state, members=members, pace=state.pace.forgotten(island)), island, "expired")
    return state, [Note(f"{island} {standing}: {reason}")]


# ---- contributions ----


def _submitted(state: RunState, event: Submitted) -> Step:
    c = event.contribution
    verdict = judge_header(state, c)
    if plan_of(state, c) and membership.is_current(state.members, c.island, c.incarnation):
        state = replace(state, offered=state.offered | {c.island})
    if verdict is None:
        return _awaited(state, c)
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
    verdict = refuse(event.problem) if event.problem else judge_norm(state, c.fragment, event.norm)
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
