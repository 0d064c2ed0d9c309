"""Admission: which contributions may enter, and when an outer step has enough of them. Every answer has its reason.

The ladder, cheapest first: run and protocol, current incarnation, schema and size, base version, seen before, lease;
then, after a look at the payload, digest, finite values and the norm against the running median.
"""

import statistics

from diloco_ray.coordination.membership import is_current, may_return
from diloco_ray.coordination.messages import Contribution, Verdict
from diloco_ray.coordination.state import RunState, ended
from diloco_ray.ids import PROTOCOL_VERSION

NORM_HISTORY = 64


def refuse(reason: str) -> Verdict:
    return Verdict("rejected", reason)


def judge_header(state: RunState, c: Contribution) -> Verdict | None:
    """The verdict that the header alone allows; None means: look at the payload."""
    rules = state.rules
    if c.run_id != rules.run_id:
        return refuse(f"foreign: run {c.run_id} contributed to run {rules.run_id}")
    if c.protocol_version != PROTOCOL_VERSION:
        return refuse(f"protocol: version {c.protocol_version} offered, {PROTOCOL_VERSION} spoken")
    if not 0 <= c.fragment < rules.num_fragments:
        return refuse(f"schema: fragment {c.fragment} of {rules.num_fragments}")
    if c.codec != rules.uplink or c.payload_bytes != rules.payload_bytes[c.fragment]:
        wanted = f"{rules.payload_bytes[c.fragment]} bytes of {rules.uplink}"
        return refuse(f"schema: {c.payload_bytes} bytes of {c.codec} where {wanted} belong")
    if c.key in state.settled:
        same = state.settled[c.key] == c.payload_sha256
        return Verdict("committed") if same else refuse("conflict: another payload with this key is committed")
    if not is_current(state.members, c.island, c.incarnation):
        if may_return(state.members, c.island, c.incarnation):
            return Verdict("unknown")
        return refuse(f"fenced: incarnation {c.incarnation} of {c.island} is not the current one")
    version = state.versions[c.fragment]
    if c.base_version != version:
        return refuse(f"stale: based on version {c.base_version}, fragment {c.fragment} is at {version}")
    known = state.inbox.get(c.key)
    if known is not None:
        if known.contribution.payload_sha256 != c.payload_sha256:
            return refuse("conflict: another payload with this key is accepted")
        return Verdict("accepted" if known.norm is not None else "pending")
    if c.fragment in state.stepping:
        return refuse(f"stale: the outer step on version {version} of fragment {c.fragment} is closed")
    lease = state.ledger.outstanding.get(c.lease_id)
    if lease is None or lease.island != c.island:
        return refuse(f"lease: {c.lease_id} is not held by {c.island}")
    return None


def judge_norm(state: RunState, norm: float) -> Verdict:
    """Accepts a payload whose digest and values are right unless its norm is absurd."""
    if state.norms:
        median = statistics.median(state.norms)
        limit = state.rules.max_norm_ratio * median
        if norm > limit > 0.0:
            return refuse(
                f"norm: {norm:.3g} is more than {state.rules.max_norm_ratio:g} x the running median {median:.3g}"
            )
    return Verdict("accepted")


def ready_to_step(state: RunState, fragment: int, now_s: float) -> str:
    """Why the fragment's outer step may be taken now; "" means: not yet."""
    if fragment in state.stepping or ended(state):
        return ""
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
    since = state.quorum_since_s.get(fragment)
    if since is not None and now_s - since >= state.rules.grace_s:
        late = ", ".join(awaited)
        return f"{len(accepted)} of {len(accepted) + len(awaited)} in; {late} overran {state.rules.grace_s:g} s"
    return ""
