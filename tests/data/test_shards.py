from pathlib import Path

import fsspec
import numpy as np
import pytest

from diloco_ray.data import prepare as preparing
from diloco_ray.data.prepare import prepare
from diloco_ray.data.settings import DataSettings
from diloco_ray.data.shards import TokenShards
from diloco_ray.data.tokenizers import load_tokenizer
from diloco_ray.errors import CorruptionError, DataError


@pytest.fixture
def prepared(corpus, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(preparing, "TOKENS_PER_SHARD", 20_000)
    monkeypatch.setattr(preparing, "BATCH_BYTES", 3_000)
    prepare(DataSettings(corpus=corpus, tokenizer="train:300"), str(tmp_path / "prepared"))
    return tmp_path / "prepared"


def test_sequences_are_slices_of_the_shards_laid_end_to_end(prepared):
    shards = TokenShards.open(str(prepared))
    split = shards.split("train")
    files = [prepared / name for name in shards.manifest.splits["train"].shards]
    tokens = np.concatenate([np.fromfile(file, "<u2") for file in files])
    assert len(files) > 2
    assert split.num_tokens == len(tokens)
    for length in (7, 1000, 30_000):  # the longest spans several shards
        number = split.num_sequences(length)
        assert number == len(tokens) // length
        indices = np.random.default_rng(0).permutation(number)
        found = split.sequences(indices, length)
        assert found.dtype == np.int64
        assert np.array_equal(found, tokens[: number * length].reshape(number, length)[indices])
    with pytest.raises(IndexError):
        split.sequences(np.array([split.num_sequences(7)]), 7)
    with pytest.raises(IndexError):
        split.sequences(np.array([-1]), 7)


def test_a_part_shorter_than_a_sequence_is_refused_with_both_numbers(prepared):
    split = TokenShards.open(str(prepared)).split("validation")
    with pytest.raises(DataError, match=f"{split.num_tokens} tokens, fewer than one sequence of 100000"):
        split.num_sequences(100_000)


def test_remote_shards_are_copied_once(prepared, tmp_path, monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.put(str(prepared), "/bucket/shards", recursive=True)
    cache = str(tmp_path / "a cache")
    indices = np.arange(20)
    expected = TokenShards.open(str(prepared)).split("train").sequences(indices, 50)
    shards = TokenShards.open("memory://bucket/shards", cache=cache)
    assert np.array_equal(shards.split("train").sequences(indices, 50), expected)
    assert load_tokenizer(shards.tokenizer_path).eos_token_id == shards.manifest.eos_token_id
    copied = {path: path.stat().st_mtime_ns for path in Path(cache).rglob("*")}
    TokenShards.open("memory://bucket/shards", cache=cache)
    assert {path: path.stat().st_mtime_ns for path in Path(cache).rglob("*")} == copied


def test_a_flipped_bit_is_noticed_here_and_far_away(prepared, tmp_path):
    shard = prepared / "train-00001.bin"
    data = bytearray(shard.read_bytes())
    data[100] ^= 4
    shard.write_bytes(data)
    split = TokenShards.open(str(prepared)).split("train")
    with pytest.raises(CorruptionError, match=r"train-00001\.bin"):
        split.sequences(np.arange(split.num_sequences(100)), 100)
    fsspec.filesystem("memory").put(str(prepared), "/bucket/damaged", recursive=True)
    with pytest.raises(CorruptionError, match=r"train-00001\.bin"):
        TokenShards.open("memory://bucket/damaged", cache=str(tmp_path / "cache"))


def test_a_truncated_and_a_missing_shard_and_an_empty_folder_are_refused_at_once(prepared, tmp_path):
    shard = prepared / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptionError, match=r"train-00000\.bin has \d+ bytes, not \d+"):
        TokenShards.open(str(prepared))
    shard.unlink()
    with pytest.raises(CorruptionError, match=r"train-00000\.bin"):
        TokenShards.open(str(prepared))
    with pytest.raises(DataError, match="no prepared data here"):
        TokenShards.open(str(tmp_path / "nothing"))
