"""Membership: who holds an island's name, since when, and how it stands.

An island's name belongs to one process at a time. A newer process takes the name over with a higher incarnation; the
older one is fenced: every message names its incarnation, and one that is not current changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Standing = Literal["expected", "alive", "absent", "lost", "left", "quarantined"]
STRIKES_TO_QUARANTINE = 3


PROGRESS = ("round", "step", "steps", "loss", "tokens_per_s")  # what an island tells of its work, while it is at it
METRICS = ("loss", "gradient_norm", "relative_error", "inner_seconds", "sync_wait_seconds", "tokens")  # and when done
MOST = 1e12  # of anything that it tells: sums and quotients of such numbers are numbers


@dataclass(frozen=True)
class Member:
    name: str
    standing: Standing
    incarnation: int = 0
    process: str = ""
    pid: int = 0
    node: str = ""
    joined_s: float = 0.0
    last_seen_s: float = 0.0
    deadline_s: float = 0.0  # an expected member is waited for until then
    strikes: int = 0
    reason: str = ""
    progress: Mapping[str, float] = field(default_factory=dict[str, float])  # of PROGRESS, what it has told


Members = Mapping[str, Member]


def plausible(told: Mapping[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """Of what an island says of itself, what has these names and can be: from 0 to `MOST`."""
    return {name: told[name] for name in names if 0.0 <= told.get(name, -1.0) <= MOST}


def with_member(members: Members, member: Member) -> dict[str, Member]:
    """The members with this one put in, in island order."""
    after = {**members, member.name: member}
    return after if member.name in members else dict(sorted(after.items()))


def names(members: Members, standing: Standing) -> tuple[str, ...]:
    """In island order."""
    return tuple([name for name, member in members.items() if member.standing == standing])


def admit(known: Member, *, now_s: float, process: str, incarnation: int, pid: int, node: str) -> Member:
    """The member after a join: a new process (incarnation 0) takes the next incarnation.

    A process that says hello again keeps its own, and so does one that outlived the coordinator, unless another
    process has held the name since.
    """
    again = process == known.process and known.incarnation > 0
    survived = incarnation > known.incarnation or (incarnation == known.incarnation > 0 and not known.process)
    if again:
        incarnation = known.incarnation
    elif not survived:
        incarnation = known.incarnation + 1
    return replace(
        known,
        standing="alive",
        incarnation=incarnation,
        joined_s=known.joined_s if again and known.standing == "alive" else now_s,
        process=process,
        pid=pid,
        node=node,
        last_seen_s=now_s,
        reason="",
    )


def is_superseded(known: Member, process: str, incarnation: int) -> bool:
    """Whether the name has gone from this process to a newer one, which lives."""
    return known.standing == "alive" and known.process != process and 0 < incarnation <= known.incarnation


def whereabouts(member: Member) -> str:
    reason = f": {member.reason}" if member.reason else ""
    return f"{member.name} ({member.standing}{reason})"


def is_current(members: Members, name: str, incarnation: int) -> bool:
    member = members.get(name)
    return member is not None and member.standing == "alive" and member.incarnation == incarnation


def may_return(members: Members, name: str, incarnation: int) -> bool:
    """Whether a process that is not alive here may say hello again: nobody newer holds the name, nor is it barred."""
    member = members.get(name)
    return member is None or (member.standing not in ("alive", "quarantined") and incarnation >= member.incarnation)


def why_not(members: Members, name: str) -> str:
    """Why a process may not hold this name."""
    member = members[name]
    if member.standing == "quarantined":
        return f"{name} is quarantined after {STRIKES_TO_QUARANTINE} bad payloads in a row: {member.reason}"
    return f"{name} is held by another process"


def silent_since(members: Members, *, now_s: float, timeout_s: float) -> tuple[Member, ...]:
    """Alive members whose lease on life ran out, in island order."""
    return tuple(m for m in members.values() if m.standing == "alive" and now_s - m.last_seen_s > timeout_s)


def overdue(members: Members, *, now_s: float) -> tuple[Member, ...]:
    """Expected members whose time to join ran out, in island order."""
    return tuple(m for m in members.values() if m.standing == "expected" and now_s > m.deadline_s)
