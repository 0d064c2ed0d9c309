"""Admission: which contributions may enter. Every answer has its reason.

The ladder, cheapest first: run and protocol, seen before, current incarnation, round, base version, lease, schema and
size; then, after a look at the payload, digest, finite values and the norm against what is usual and what is possible.
What is merely late or repeated costs the island nothing; what is wrong under a lease that it holds is a strike.
"""

import math
import statistics

from diloco_ray.coordination.membership import is_current, may_return
from diloco_ray.coordination.messages import Contribution, InnerPlan, Verdict
from diloco_ray.coordination.state import Accepted, Rules, RunState, ended
from diloco_ray.ids import PROTOCOL_VERSION

NORM_HISTORY = 64  # per fragment
ENOUGH_NORMS = 8  # committed: what is usual is known
MAX_REASON = 500  # characters: a reason may name what was sent


def refuse(reason: str) -> Verdict:
    return Verdict("rejected", reason[:MAX_REASON])


def judge_header(state: RunState, c: Contribution) -> Verdict | None:
    """The verdict on whether the contribution is awaited at all; None means: it is."""
    rules = state.rules
    if c.run_id != rules.run_id:
        return refuse(f"foreign: run {c.run_id} contributed to run {rules.run_id}")
    if c.protocol_version != PROTOCOL_VERSION:
        return refuse(f"protocol: version {c.protocol_version} offered, {PROTOCOL_VERSION} spoken")
    if not 0 <= c.fragment < rules.num_fragments:
        return refuse(f"schema: fragment {c.fragment} of {rules.num_fragments}")
    round, digest = state.settled.get((c.fragment, c.island), (-1, ""))
    if c.round == round >= 0:
        same = digest == c.payload_sha256
        return Verdict("committed") if same else refuse("conflict: another payload with this key is committed")
    if c.round < round:
        return refuse(f"stale: a contribution to round {round + 1} is committed, this one is for round {c.round + 1}")
    if c.round < 0:
        return refuse(f"schema: round {c.round + 1}")
    if ended(state):
        return refuse(f"over: the run has {state.phase}")
    if not is_current(state.members, c.island, c.incarnation):
        if may_return(state.members, c.island, c.incarnation):
            return Verdict("unknown")
        return refuse(f"fenced: incarnation {c.incarnation} of {c.island} is not the current one")
    known = state.inbox.get(c.key)
    if known is not None:
        same = known.contribution.payload_sha256 == c.payload_sha256
        if not same and known.contribution.incarnation == c.incarnation:
            return refuse("conflict: another payload with this key is accepted")
        return Verdict("accepted" if known.norm is not None else "pending")
    plan = plan_of(state, c)
    if problem := _time_problem(state, c, plan):
        return refuse(f"stale: {problem}")
    if plan is None or c.lease_id not in state.ledger.outstanding:
        return refuse(f"lease: {c.lease_id} is not held by {c.island}")
    return None


def is_outdated(state: RunState, c: Contribution, verdict: Verdict) -> bool:
    """Whether it is refused because the base of work in hand is too old: nothing that comes of that work would do."""
    plan = plan_of(state, c)
    in_hand = plan is not None and not state.is_whole(plan) and 0 <= c.fragment < state.rules.num_fragments
    if state.rules.in_step or not in_hand:
        return False
    problem = _time_problem(state, c, plan)
    return bool(problem) and verdict == refuse(f"stale: {problem}")


def plan_of(state: RunState, c: Contribution) -> InnerPlan | None:
    return next((p for p in state.plans.get(c.island, ()) if (p.lease_id, p.round) == (c.lease_id, c.round)), None)


def _time_problem(state: RunState, c: Contribution, plan: InnerPlan | None) -> str:
    """Too late, or from a base that is too old; "" means: neither. Early ones, of a plan that is given, wait."""
    rules, version = state.rules, state.versions[c.fragment]
    if not 0 <= c.base_version <= version:
        return f"based on version {c.base_version}, fragment {c.fragment} is at {version}"
    if not rules.in_step:
        lag = version - c.base_version
        return "" if lag <= rules.max_staleness else f"its base is {lag} outer steps old, of {rules.max_staleness}"
    if c.round < version or (c.round == version and c.fragment in state.stepping):
        return f"for round {c.round + 1}, fragment {c.fragment} has closed it"
    silent_rounds = plan.round - plan.first_round if plan else 0
    # With a whole round of overlap, what a round began with had not yet seen the round before.
    lag = silent_rounds + (1 if rules.overlap >= rules.inner_steps_per_round else 0)
    if c.base_version < c.round - lag:
        return f"based on version {c.base_version}, round {c.round + 1} begins at {c.round - lag}"
    return ""


def schema_problem(rules: Rules, c: Contribution) -> str:
    """What is wrong with the payload's announced form; "" means: nothing."""
    wanted = rules.payload_bytes[c.fragment]
    if c.codec == rules.uplink and c.payload_bytes == wanted:
        return ""
    return f"schema: {c.payload_bytes} bytes of {c.codec} where {wanted} bytes of {rules.uplink} belong"


def lack_of_room(state: RunState, c: Contribution) -> str:
    """Why the contribution has to wait outside; "" means: it has not.

    Of each island the oldest contribution to a fragment always gets in: those are what the next outer steps are made
    of, so that every step that could be taken with room for all can be taken, and makes room.
    """
    limit, held = state.rules.max_inbox_bytes, sum(item.contribution.payload_bytes for item in state.inbox.values())
    stepping = state.stepping.get(c.fragment, ())
    rounds = [key[1] for key in state.inbox if (key[0], key[2]) == (c.fragment, c.island) and key not in stepping]
    if held + c.payload_bytes <= limit or min(rounds, default=c.round) >= c.round:
        return ""
    return (
        f"{held:,} of {limit:,} bytes are taken; it waits until fragment {c.fragment} has had the outer step "
        f"with this island's round {min(rounds) + 1}"
    )


def judge_norm(state: RunState, held: Accepted, norm: float) -> Verdict:
    """Accepts a payload whose digest and values are right unless its norm is absurd.

    That is above what is usual, by the running median. While few are committed, it is above what is possible as well,
    by the recipe: else the first contributions would be measured by nothing, and the next ones by those.
    """
    if not math.isfinite(norm):
        return refuse(f"values: the norm of the outer gradient is {norm}")
    rules, fragment = state.rules, held.contribution.fragment
    committed = state.norms.get(fragment, ())
    longest = rules.longest[fragment] if rules.longest and len(committed) < ENOUGH_NORMS else 0.0
    longest *= max(1.0, held.inner_steps / rules.inner_steps_per_round)
    waiting = [item.norm for key, item in state.inbox.items() if key[0] == fragment and item.norm is not None]
    seen = [*committed, *waiting]
    median = statistics.median(seen) if seen else 0.0
    if norm > max(longest, rules.max_norm_ratio * median) > 0.0:
        usual = f"{rules.max_norm_ratio:g} x the running median {median:.3g}"
        possible = f"{longest:.3g}, which {held.inner_steps} inner steps do not exceed"
        bounds = [usual] * (median > 0.0) + [possible] * (longest > 0.0)
        return refuse(f"norm: {norm:.3g} is more than {' and than '.join(bounds)}")
    return Verdict("accepted")
