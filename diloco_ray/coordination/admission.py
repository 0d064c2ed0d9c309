"""Admission: which contributions may enter, and when an outer step has enough of them. Every answer has its reason.

The ladder, cheapest first: run and protocol, current incarnation, base version, seen before, lease, schema and size,
fragments in order; then, after a look at the payload, digest, finite values and the norm against the running median.
What is merely late or repeated costs the island nothing; what is wrong under a lease that it holds is a strike.
"""

import math
import statistics

from diloco_ray.coordination.membership import is_current, may_return
from diloco_ray.coordination.messages import Contribution, Verdict
from diloco_ray.coordination.state import Rules, RunState, ended
from diloco_ray.ids import PROTOCOL_VERSION

NORM_HISTORY = 64


def refuse(reason: str) -> Verdict:
    return Verdict("rejected", reason)


def judge_header(state: RunState, c: Contribution) -> Verdict | None:
    """The verdict on whether the contribution is awaited at all; None means: it is."""
    rules = state.rules
    if c.run_id != rules.run_id:
        return refuse(f"foreign: run {c.run_id} contributed to run {rules.run_id}")
    if c.protocol_version != PROTOCOL_VERSION:
        return refuse(f"protocol: version {c.protocol_version} offered, {PROTOCOL_VERSION} spoken")
    if not 0 <= c.fragment < rules.num_fragments:
        return refuse(f"schema: fragment {c.fragment} of {rules.num_fragments}")
    if c.key in state.settled:
        same = state.settled[c.key] == c.payload_sha256
        return Verdict("committed") if same else refuse("conflict: another payload with this key is committed")
    if ended(state):
        return refuse(f"over: the run has {state.phase}")
    if not is_current(state.members, c.island, c.incarnation):
        if may_return(state.members, c.island, c.incarnation):
            return Verdict("unknown")
        return refuse(f"fenced: incarnation {c.incarnation} of {c.island} is not the current one")
    version = state.versions[c.fragment]
    if not c.base_version == version == state.round:
        at = f"fragment {c.fragment} is at {version} in round {state.round + 1}"
        return refuse(f"stale: based on version {c.base_version}, {at}")
    known = state.inbox.get(c.key)
    if known is not None:
        if known.contribution.payload_sha256 != c.payload_sha256:
            return refuse("conflict: another payload with this key is accepted")
        return Verdict("accepted" if known.norm is not None else "pending")
    if c.fragment in state.stepping:
        return refuse(f"stale: the outer step on version {version} of fragment {c.fragment} is closed")
    plan = state.plans.get(c.island)
    if plan is None or plan.lease_id != c.lease_id or c.lease_id not in state.ledger.outstanding:
        return refuse(f"lease: {c.lease_id} is not held by {c.island}")
    return None


def schema_problem(rules: Rules, c: Contribution) -> str:
    """What is wrong with the payload's announced form; "" means: nothing."""
    wanted = rules.payload_bytes[c.fragment]
    if c.codec == rules.uplink and c.payload_bytes == wanted:
        return ""
    return f"schema: {c.payload_bytes} bytes of {c.codec} where {wanted} bytes of {rules.uplink} belong"


def order_problem(state: RunState, c: Contribution) -> str:
    """An island sends its fragments in order, so that one whose lease closes has given all that the round needs.

    A coordinator that was restarted in between has lost the earlier ones, and nobody will send them again.
    """
    earlier = [p for p in range(c.fragment) if state.is_open(p) and (p, c.base_version, c.island) not in state.inbox]
    return f"order: fragment {earlier[0]} of this round is missing before {c.fragment}" if earlier else ""


def judge_norm(state: RunState, norm: float) -> Verdict:
    """Accepts a payload whose digest and values are right unless its norm is absurd."""
    if not math.isfinite(norm):
        return refuse(f"values: the norm of the outer gradient is {norm}")
    seen = [*state.norms, *(item.norm for item in state.inbox.values() if item.norm is not None)]
    if seen:
        median = statistics.median(seen)
        limit = state.rules.max_norm_ratio * median
        if norm > limit > 0.0:
            return refuse(
                f"norm: {norm:.3g} is more than {state.rules.max_norm_ratio:g} x the running median {median:.3g}"
            )
    return Verdict("accepted")


def ready_to_step(state: RunState, fragment: int, now_s: float) -> str:
    """Why the fragment's outer step may be taken now; "" means: not yet."""
    if not state.is_open(fragment) or ended(state):
        return ""
    if fragment == state.closing_fragment and any(state.is_open(p) for p in range(fragment)):
        return ""  # it ends every lease: what is still open then could be contributed to by nobody
    accepted = state.accepted(fragment)
    # Islands that worked on this round before a coordinator restart are expected back: wait for them too.
    expected = [name for name, member in state.members.items() if member.standing == "expected"]
    at_work = [name for name, plan in state.plans.items() if is_current(state.members, name, plan.incarnation)]
    awaited = [name for name in at_work if name not in accepted] + expected
    inspecting = any(k[0] == fragment and item.norm is None for k, item in state.inbox.items())
    if len(accepted) < max(1, state.rules.min_islands) or inspecting:
        return ""
    if not awaited:
        return f"all {len(accepted)} live islands in"
    since = state.quorum_since_s(fragment)
    if since is not None and now_s - since >= state.rules.grace_s:
        late = ", ".join(awaited)
        return f"{len(accepted)} of {len(accepted) + len(awaited)} in; {late} overran {state.rules.grace_s:g} s"
    return ""
