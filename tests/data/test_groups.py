"""Groups of training documents: found, kept apart in the token shards, and found again after an interruption."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from diloco_ray.data import prepare as room
from diloco_ray.data.groups import CENTRES, NUM_FEATURES, features, k_means, nearest
from diloco_ray.data.prepare import place, prepare
from diloco_ray.data.settings import DataSettings
from diloco_ray.data.shards import TokenShards
from diloco_ray.errors import DataError
from tests.data.conftest import speaker

ALPHABETS = ("abcdefgh", "stuvwxyz", "АБВГДЕЖЗ")  # texts that share no pair of bytes


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(room, "TOKENS_PER_SHARD", 20_000)
    monkeypatch.setattr(room, "BATCH_BYTES", 3_000)


@pytest.fixture(scope="module")
def three_kinds(tmp_path_factory) -> str:
    """A hundred texts of each alphabet, in turn; some of them of a few letters only."""
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("kinds") / "texts.jsonl"
    texts = ["".join(rng.choices(ALPHABETS[n % 3], k=rng.choice([30, 300, 3000]))) for n in range(300)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def group_texts(folder: Path, group: int) -> list[bytes]:
    """Of a folder prepared with the tokenizer `bytes`."""
    manifest = TokenShards.open(str(folder)).manifest
    tokens = b"".join((folder / name).read_bytes() for name in manifest.splits["train"].groups[group].shards)
    assert len(tokens) == manifest.splits["train"].groups[group].num_tokens
    return tokens.split(b"\0")[:-1]


def by_label(corpus: str) -> DataSettings:
    return DataSettings(corpus=corpus, shards="label", label_column="speaker")


def test_each_label_is_a_group_with_its_documents_in_order(corpus, documents, tmp_path, small_parts):
    manifest = prepare(by_label(corpus), str(tmp_path))
    limit = 0.02 * 2**64
    assert [group.name for group in manifest.splits["train"].groups] == ["A", "B"]
    assert [group.name for group in manifest.splits["validation"].groups] == ["all"]
    for number, group in enumerate(manifest.splits["train"].groups):
        expected = [
            text.encode()
            for n, text in enumerate(documents)
            if speaker(n) == group.name and place(text.encode()) >= limit
        ]
        assert group_texts(tmp_path, number) == expected
        assert group.num_documents == len(expected)
        assert len(group.shards) > 3
    assert manifest.splits["train"].shards[0] == "train-0-00000.bin"


def test_groups_change_neither_the_validation_part_nor_the_tokenizer(corpus, tmp_path):
    iid = prepare(DataSettings(corpus=corpus, tokenizer="train:300"), str(tmp_path / "iid"))
    split = by_label(corpus).model_copy(update={"tokenizer": "train:300"})
    grouped = prepare(split, str(tmp_path / "grouped"))
    assert grouped.tokenizer_digest == iid.tokenizer_digest
    name = "validation-00000.bin"
    assert grouped.files[name] == iid.files[name]
    assert grouped.num_tokens == iid.num_tokens


@pytest.mark.parametrize("length", [7, 100, 1000])
def test_no_sequence_holds_text_of_two_groups(corpus, tmp_path, small_parts, length):
    prepare(by_label(corpus), str(tmp_path))
    split = TokenShards.open(str(tmp_path)).split("train")
    assert split.shard_sizes(length) == tuple(group.num_tokens // length for group in split.groups)
    for shard, number in enumerate(split.shard_sizes(length)):
        text = b"\0".join(group_texts(tmp_path, shard)) + b"\0"
        found = split.sequences(np.arange(number), length, shard).astype(np.uint8).tobytes()
        assert found == text[: number * length]
        with pytest.raises(IndexError, match=rf"group {shard} \([AB]\)"):
            split.sequences(np.array([number]), length, shard)


def test_texts_that_differ_in_kind_are_told_apart(three_kinds, tmp_path):
    manifest = prepare(DataSettings(corpus=three_kinds, shards="cluster", clusters=3), str(tmp_path))
    groups = manifest.splits["train"].groups
    assert [group.name for group in groups] == ["cluster-0", "cluster-1", "cluster-2"]
    kinds = []
    for number in range(3):
        texts = group_texts(tmp_path, number)
        (kind,) = {next(n for n, letters in enumerate(ALPHABETS) if text.decode()[0] in letters) for text in texts}
        kinds.append(kind)
    assert sorted(kinds) == [0, 1, 2]


def test_more_clusters_than_different_texts_are_refused(tmp_path):
    lines = [json.dumps({"text": f"text {n % 2} of two"}) + "\n" for n in range(200)]
    (tmp_path / "two.jsonl").write_text("".join(lines))
    settings = DataSettings(corpus=str(tmp_path / "two.jsonl"), shards="cluster", clusters=3, validation_fraction=1e-9)
    with pytest.raises(DataError, match="no 3 groups can be made: only"):
        prepare(settings, str(tmp_path / "to"))


@pytest.mark.parametrize("kind", ["label", "cluster"])
def test_an_interrupted_prepare_goes_on_with_the_groups_it_had(corpus, tmp_path, monkeypatch, small_parts, kind):
    settings = DataSettings(corpus=corpus, shards=kind, label_column="speaker", clusters=3)
    prepare(settings, str(tmp_path / "whole"))

    def stop(done: int, total: int | None) -> None:
        if done > 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(settings, str(tmp_path / "torn"), progress=stop)
    monkeypatch.setattr(room, "find_groups", lambda *_: pytest.fail("groups were looked for again"))
    prepare(settings, str(tmp_path / "torn"))
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "torn" / path.relative_to(tmp_path / "whole")).read_bytes()
    assert (tmp_path / "whole" / CENTRES).exists() == (kind == "cluster")


# ---- k-means ----


def test_features_are_vectors_of_length_one_however_short_the_text():
    rows = features([b"", b"a", b"ab", "größer".encode(), b"x" * 100_000])
    assert rows.shape == (5, NUM_FEATURES)
    np.testing.assert_allclose((rows**2).sum(axis=1), [0, 1, 1, 1, 1], rtol=1e-6)


def test_centres_are_the_means_of_what_is_nearest_to_them():
    rng = np.random.default_rng(3)
    middle = np.abs(rng.normal(size=(4, NUM_FEATURES)))
    rows = np.repeat(middle, 50, axis=0) + np.abs(rng.normal(size=(200, NUM_FEATURES))) * 0.3
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    weights = rng.integers(1, 100, size=200).astype(np.float64)
    centres = k_means(rows, weights, 4)
    own = nearest(rows, centres)
    assert all(len(set(own[start : start + 50])) == 1 for start in range(0, 200, 50))
    for number in range(4):
        mean = np.average(rows[own == number], axis=0, weights=weights[own == number])
        np.testing.assert_allclose(centres[number], mean, rtol=1e-4, atol=1e-6)
    heaviness = [weights[own == number].sum() for number in range(4)]
    assert heaviness == sorted(heaviness, reverse=True)
    assert np.array_equal(k_means(rows, weights, 4), centres)
