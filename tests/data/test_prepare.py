from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from diloco_ray.data import prepare as room
from diloco_ray.data.manifest import Manifest
from diloco_ray.data.prepare import place, prepare, smallest_dtype
from diloco_ray.data.settings import DataSettings
from diloco_ray.data.tokenizers import load_tokenizer
from diloco_ray.errors import CorruptionError, DataError, StoreError


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(room, "TOKENS_PER_SHARD", 20_000)
    monkeypatch.setattr(room, "BATCH_BYTES", 3_000)


def tree(folder: str | Path) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def split_documents(manifest: Manifest, folder, name: str) -> list[list[int]]:
    """The token lists between the end-of-document tokens, read without diloco_ray."""
    shards = [np.fromfile(Path(folder) / shard, manifest.dtype) for shard in manifest.splits[name].shards]
    tokens = np.concatenate(shards)
    assert tokens[-1] == manifest.eos_token_id
    ends = np.flatnonzero(tokens == manifest.eos_token_id)
    return [piece[:-1].tolist() for piece in np.split(tokens, ends + 1)[:-1]]


def test_bytes_of_each_document_in_order_then_a_zero(corpus, documents, tmp_path):
    manifest = prepare(DataSettings(corpus=corpus), str(tmp_path))
    for name, part in (("train", False), ("validation", True)):
        found = [bytes(tokens).decode() for tokens in split_documents(manifest, tmp_path, name)]
        assert found == [text for text in documents if (place(text.encode()) < 0.02 * 2**64) == part]
    assert manifest.num_tokens == {
        name: sum((tmp_path / shard).stat().st_size for shard in split.shards)
        for name, split in manifest.splits.items()
    }
    assert (manifest.vocab_size, manifest.eos_token_id, manifest.dtype) == (256, 0, "|u1")
    assert manifest.corpus["num_documents"] == len(documents)


def test_the_standard_library_prepares_with_a_validation_part(tmp_path):
    manifest = prepare(DataSettings(), str(tmp_path))
    assert manifest.num_tokens["train"] > 5_000_000
    assert 0.002 < manifest.num_tokens["validation"] / manifest.num_tokens["train"] < 0.1


def test_many_parts_hold_the_same_tokens_as_one(corpus, tmp_path, small_parts):
    manifest = prepare(DataSettings(corpus=corpus), str(tmp_path / "many"))
    assert len(manifest.splits["train"].shards) > 3
    many = split_documents(manifest, tmp_path / "many", "train")
    room.TOKENS_PER_SHARD = 10**9
    manifest = prepare(DataSettings(corpus=corpus), str(tmp_path / "one"))
    assert manifest.splits["train"].shards == ("train-00000.bin",)
    assert split_documents(manifest, tmp_path / "one", "train") == many


@pytest.mark.parametrize("tokenizer", ["bytes", "train:300"])
def test_an_interrupted_prepare_goes_on_and_gives_the_same_bytes(corpus, tmp_path, monkeypatch, small_parts, tokenizer):
    settings = DataSettings(corpus=corpus, tokenizer=tokenizer)
    prepare(settings, str(tmp_path / "whole"))
    expected = tree(tmp_path / "whole")

    class KilledError(Exception):
        pass

    write, num_writes = room.PreparedFolder.write, 0
    seen: list[int] = []
    starts: list[int] = []

    def write_or_die(self, name, data):
        nonlocal num_writes
        num_writes += 1
        if num_writes % 4 == 0:
            raise KilledError
        return write(self, name, data)

    monkeypatch.setattr(room.PreparedFolder, "write", write_or_die)
    for _ in range(100):
        try:
            prepare(settings, str(tmp_path / "torn"), progress=lambda done, total: seen.append(done))
            break
        except KilledError:
            starts += seen[:1]
            seen.clear()
    assert tree(tmp_path / "torn") == expected
    assert len(set(starts)) > 3  # later attempts did not start from the first document


def test_a_damaged_or_foreign_journal_means_starting_over(corpus, tmp_path, monkeypatch, small_parts):
    settings = DataSettings(corpus=corpus)
    prepare(settings, str(tmp_path / "whole"))
    other = DataSettings(corpus=corpus, validation_fraction=0.3)

    def stop(done, total):
        if done > 150:
            raise KeyboardInterrupt

    for damage in (b"", b"{}", b"[1]", None):
        folder = tmp_path / f"torn {damage!r}"
        with pytest.raises(KeyboardInterrupt):
            prepare(other if damage is None else settings, str(folder), progress=stop)
        if damage is not None:
            (folder / "journal.json").write_bytes(damage)
        prepare(settings, str(folder))
        assert tree(folder) == tree(tmp_path / "whole")


def test_the_same_settings_again_return_at_once_and_other_ones_are_refused(corpus, tmp_path, monkeypatch):
    settings = DataSettings(corpus=corpus, sequence_length=32)
    first = prepare(settings, str(tmp_path))
    monkeypatch.setattr(room, "open_corpus", lambda settings: pytest.fail("the corpus was read again"))
    assert prepare(settings.model_copy(update={"sequence_length": 64}), str(tmp_path)) == first
    with pytest.raises(DataError, match=r"validation_fraction: 0\.02 -> 0\.1") as caught:
        prepare(settings.model_copy(update={"validation_fraction": 0.1}), str(tmp_path))
    assert "tokenizer" not in caught.value.what


def test_a_trained_tokenizer_knows_the_train_part_and_loads_with_transformers(corpus, documents, tmp_path):
    manifest = prepare(DataSettings(corpus=corpus, tokenizer="train:320"), str(tmp_path))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert manifest.vocab_size == len(tokenizer) == 320
    assert manifest.dtype == "<u2"
    found = [tokenizer.decode(tokens) for tokens in split_documents(manifest, tmp_path, "train")]
    assert found == [text for text in documents if place(text.encode()) >= 0.02 * 2**64]
    manifest_again = prepare(DataSettings(corpus=corpus, tokenizer="train:320"), str(tmp_path / "again"))
    assert manifest_again.digest == manifest.digest


def test_a_tokenizer_from_a_folder_is_kept_beside_the_shards(corpus, tmp_path):
    first = prepare(DataSettings(corpus=corpus, tokenizer="train:300"), str(tmp_path / "a"))
    folder = str(tmp_path / "a" / "tokenizer")
    second = prepare(DataSettings(corpus=corpus, tokenizer=folder), str(tmp_path / "b"))
    assert second.num_tokens == first.num_tokens
    assert load_tokenizer(tmp_path / "b" / "tokenizer").get_vocab() == load_tokenizer(folder).get_vocab()
    with pytest.raises(DataError, match="no-such-tokenizer"):
        prepare(DataSettings(corpus=corpus, tokenizer="no-such-tokenizer"), str(tmp_path / "c"))


def test_a_corpus_too_small_for_a_validation_part_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("one line")
    with pytest.raises(DataError, match=r"none of 1 documents fell into the (train|validation) part"):
        prepare(DataSettings(corpus=str(tmp_path / "note.txt")), str(tmp_path / "to"))


def test_progress_counts_documents_up_to_the_total(corpus, documents, tmp_path, small_parts):
    seen: list[tuple[int, int | None]] = []
    prepare(DataSettings(corpus=corpus), str(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (len(documents), len(documents))


def test_the_folder_may_be_remote_and_must_be_writable(corpus, tmp_path):
    manifest = prepare(DataSettings(corpus=corpus), "memory://prepared/here")
    assert prepare(DataSettings(corpus=corpus), str(tmp_path / "here")).digest == manifest.digest
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="file/under"):
        prepare(DataSettings(corpus=corpus), str(tmp_path / "file" / "under"))


def test_the_manifest_names_every_file_and_notices_damage(corpus, tmp_path):
    settings = DataSettings(corpus=corpus)
    manifest = prepare(settings, str(tmp_path))
    data = (tmp_path / "manifest.json").read_bytes()
    assert Manifest.from_bytes(data, "here") == manifest
    assert set(manifest.files) | {"manifest.json"} == set(tree(tmp_path))
    for at in range(0, len(data), 37):
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        with pytest.raises(CorruptionError, match="here"):
            Manifest.from_bytes(flipped, "here")
    (tmp_path / "train-00000.bin").unlink()
    with pytest.raises(CorruptionError, match=r"train-00000\.bin is missing"):
        prepare(settings, str(tmp_path))


def test_the_validation_share_is_the_fraction_asked_for():
    counts = Counter(place(str(number).encode()) < 0.1 * 2**64 for number in range(10_000))
    assert 900 < counts[True] < 1100


@pytest.mark.parametrize(("vocab_size", "name"), [(256, "|u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_tokens_take_the_fewest_bytes_that_hold_the_vocabulary(vocab_size, name):
    assert smallest_dtype(vocab_size).str == name
