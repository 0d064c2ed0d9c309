"""A whole run, islands and coordinator in one process, is killed at every I/O call and the same command is given again.

What a kill leaves is what the storage holds at that moment. So one run is recorded, with the storage's content before
and after each of its calls; then every content that occurred is put into a fresh store and the run is taken up from it.
Kills between which nothing was written leave the same content, from which the run is taken up once. The recorded run is
itself killed once and taken up again, so that the calls of a resume are among those that are killed at.
"""

from typing import Any

import pytest

from diloco_ray.observe.events import of_kind, read_events
from tests.conftest import Show
from tests.recovery.situation import KEEPS_RESIDUALS, SHORT, Files, Situation, assert_whole, digests, records_of

OTHERS: dict[str, dict[str, Any]] = {
    "two fragments": {"sync": {"fragments": 2, "offsets": "together"}},
    "streaming": {"sync": {"preset": "streaming", "fragments": 2, "overlap": 1}},
    "eager": {"sync": {"preset": "eager", "fragments": 2}},
    "async": {"sync": {"preset": "async"}},
    "decoupled": {"sync": {"preset": "decoupled", "fragments": 3}},
    "many records after the last snapshot, with Muon": {
        "rounds": 4,
        "inner": {"optimizer": "muon"},
        "storage": {"snapshot_every_rounds": 100},
    },
}


def distinct(contents: list[Files]) -> list[tuple[Files, int]]:
    """Each content once, and at how many moments the storage held it."""
    found: dict[frozenset[tuple[str, bytes]], int] = {}
    for files in contents:
        content = frozenset(files.items())
        found[content] = found.get(content, 0) + 1
    return [(dict(content), count) for content, count in found.items()]


@pytest.mark.parametrize("situation", ["local", "memory", "s3"], indirect=True)
def test_a_run_killed_at_any_io_call_ends_with_the_bits_of_one_that_was_not(
    situation: Situation, request: pytest.FixtureRequest, show: Show
) -> None:
    """With error feedback: the beginning, the fence, commits, residuals, checkpoints, snapshots, pruning."""
    recipe = SHORT if "s3" in situation.url else KEEPS_RESIDUALS
    expected = digests(records_of(situation.taken_up(recipe)))
    contents = situation.recorded(recipe).contents
    num_recovered = 0
    for left, num_moments in distinct(contents):
        run = situation.taken_up(recipe, left)
        records = records_of(run)
        assert_whole(run, records, left)
        assert digests(records) == expected
        num_recovered += num_moments
    show(f"crash points, {request.node.callspec.id}: {len(contents)} enumerated, {num_recovered} recovered")
    assert len(contents) == num_recovered
    assert len(contents) > 150


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_of_any_recipe_killed_at_any_io_call_is_whole(situation: Situation, name: str, show: Show) -> None:
    """Where training goes on while fragments travel, what an island had not yet sent is gone with it, and only then."""
    recipe = OTHERS[name]
    whole = records_of(situation.taken_up(recipe))
    contents = situation.recorded(recipe).contents
    num_recovered = 0
    for left, num_moments in distinct(contents):
        run = situation.taken_up(recipe, left)
        records = records_of(run)
        assert_whole(run, records, left)
        sync, tail, end = run.config.sync, records[-1], whole[-1]
        assert tail.round == end.round == run.config.rounds
        refused = [e["text"] for e in of_kind(read_events(run.store), "decision") if "rejected" in e["text"]]
        if sync.closes == "quorum":  # a round is repeated of which a fragment is committed: not once more
            refused = [line for line in refused if not line.endswith("another payload with this key is committed")]
        assert refused == []
        if sync.closes == "all":
            assert (tail.index, tail.tokens["committed"]) == (end.index, end.tokens["committed"])
        num_steps = sum(path.startswith("log/0") for path in left) - 1
        between_fragments = num_steps > 0 and num_steps % sync.fragments != 0
        if sync.closes == "all" and sync.overlap == 0 and not between_fragments:
            assert digests(records) == digests(whole)
        num_recovered += num_moments
    show(f"crash points, {name}: {len(contents)} enumerated, {num_recovered} recovered")
    assert len(contents) == num_recovered
    assert len(contents) > 150
