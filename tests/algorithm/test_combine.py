"""Combines: each one's equation in NumPy float64, and what does not change the result."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco_ray.algorithm import combine as combine_module
from diloco_ray.algorithm.codecs import CODEC_NAMES, Codec, get_codec
from diloco_ray.algorithm.combine import COMBINES, Contributions
from diloco_ray.algorithm.fragments import is_embedding, partition
from diloco_ray.algorithm.settings import OuterSettings

# Tensors that begin and end inside blocks of 256 values; one that is smaller than a block; an embedding and a head.
SHAPES = {"embed_tokens.weight": (30, 10), "body": (37, 53), "norm": (7,), "bias": (300,), "lm_head.weight": (10, 30)}
(FRAGMENT,) = partition(SHAPES).fragments
NUM_VALUES = FRAGMENT.num_values


def gaussian(seed: int, scale: float = 1.0, num_values: int = NUM_VALUES) -> torch.Tensor:
    return torch.randn(num_values, generator=torch.Generator().manual_seed(seed)) * scale


def encoded(values: torch.Tensor, codec: Codec) -> torch.Tensor:
    payload = torch.zeros(codec.num_bytes(values.numel()), dtype=torch.uint8)
    codec.encode_(values, payload, 0, values.numel())
    return payload


def combined(
    name: str, vectors: list[torch.Tensor], weights: list[float], codec: str = "float32", chunk: int = 10**6
) -> torch.Tensor:
    payloads = [encoded(vector, get_codec(codec)) for vector in vectors]
    write_ = COMBINES[name](Contributions(payloads, weights, get_codec(codec), NUM_VALUES), FRAGMENT)
    out = torch.full((NUM_VALUES,), torch.nan)
    for start in range(0, NUM_VALUES, chunk):
        part = out[start : start + chunk]
        write_(start, part, torch.full_like(part, torch.nan))
    return out


def decoded(vectors: list[torch.Tensor], codec: str) -> np.ndarray:
    """(num_contributions, NUM_VALUES) float64."""
    found: list[np.ndarray] = []
    for vector in vectors:
        out = torch.empty(NUM_VALUES)
        get_codec(codec).decode_(encoded(vector, get_codec(codec)), 0, NUM_VALUES, out)
        found.append(out.double().numpy())
    return np.stack(found)


# ---- the equations, written out ----


def mean_by_hand(v: np.ndarray, w: np.ndarray) -> np.ndarray:
    return w @ v / w.sum()


def radial_by_hand(v: np.ndarray, w: np.ndarray) -> np.ndarray:
    found = mean_by_hand(v, w)
    for slot in FRAGMENT.slots:
        if slot.name not in ("embed_tokens.weight", "lm_head.weight"):
            here = slice(slot.offset, slot.offset + slot.num_values)
            directions = np.stack([direction_of(row) for row in v[:, here]])
            mean_length = w @ np.linalg.norm(v[:, here], axis=1) / w.sum()
            found[here] = mean_length * direction_of(w @ directions / w.sum())
    return found


def direction_of(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x) if np.linalg.norm(x) > 1e-6 else 0.0 * x


def clipped_mean_by_hand(v: np.ndarray, w: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(v, axis=1)
    return mean_by_hand(v * np.minimum(1.0, np.median(norms) / norms)[:, None], w)


def trimmed_mean_by_hand(v: np.ndarray, w: np.ndarray) -> np.ndarray:
    return mean_by_hand(v, w) if len(v) < 3 else np.sort(v, axis=0)[1:-1].mean(0)


def median_by_hand(v: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.median(v, axis=0)


BY_HAND = {
    "mean": mean_by_hand,
    "radial": radial_by_hand,
    "clipped_mean": clipped_mean_by_hand,
    "trimmed_mean": trimmed_mean_by_hand,
    "median": median_by_hand,
}


@pytest.mark.parametrize("name", COMBINES)
@settings(deadline=None, max_examples=25)
@given(
    weights=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=9),
    codec=st.sampled_from(CODEC_NAMES),
    seed=st.integers(0, 10**6),
)
def test_it_is_its_equation(name: str, weights: list[float], codec: str, seed: int):
    vectors = [gaussian(seed + m, 2.0**m) for m in range(len(weights))]
    expected = BY_HAND[name](decoded(vectors, codec), np.array(weights))
    slack = 4e-6 * max(float(vector.abs().max()) for vector in vectors)
    if name == "radial":
        slack *= 100  # directions of a small tensor that nearly cancel
    np.testing.assert_allclose(combined(name, vectors, weights, codec).numpy(), expected, rtol=0, atol=slack)


@pytest.mark.parametrize(("name", "by_hand"), [("mean", mean_by_hand), ("radial", radial_by_hand)])
def test_decoupled_diloco_weights_by_tokens_times_tokens_a_step(name: str, by_hand: Any):
    """w = tokens (tokens / steps), arXiv 2604.21428: an island of larger batches counts for more than its tokens."""
    tokens, steps = np.array([4096.0, 8192.0, 8192.0, 100.0]), np.array([24.0, 24.0, 48.0, 1.0])
    vectors = [gaussian(m) for m in range(4)]
    found = combined(name, vectors, [float(w) for w in tokens * tokens / steps])
    expected = by_hand(decoded(vectors, "float32"), tokens * (tokens / steps))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)
    assert not np.allclose(found.numpy(), by_hand(decoded(vectors, "float32"), tokens), atol=1e-2)


# ---- what does not count ----


@pytest.mark.parametrize("codec", ["float32", "int8"])
@pytest.mark.parametrize("name", COMBINES)
@pytest.mark.parametrize("num_islands", [1, 2, 5, 8])
def test_neither_chunks_nor_threads_change_a_bit(
    name: str, num_islands: int, codec: str, monkeypatch: pytest.MonkeyPatch
):
    vectors, weights = [gaussian(m, 1.5**m) for m in range(num_islands)], [1.0 + m for m in range(num_islands)]
    whole = combined(name, vectors, weights, codec)
    for chunk in (256, 1024):
        monkeypatch.setattr(combine_module, "CHUNK_VALUES", chunk)
        assert torch.equal(combined(name, vectors, weights, codec, chunk), whole)
    default = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(combined(name, vectors, weights, codec, 256), whole)
    finally:
        torch.set_num_threads(default)


@pytest.mark.parametrize("name", COMBINES)
def test_threads_change_no_bit_of_a_vector_that_torch_works_on_in_parallel(name: str):
    (fragment,) = partition({"large": (200_001,)}).fragments
    payloads = [encoded(gaussian(m, num_values=200_001), get_codec("float32")) for m in range(4)]
    found: list[torch.Tensor] = []
    default = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            contributions = Contributions(payloads, [1, 2, 3, 4], get_codec("float32"), 200_001)
            out, scratch = torch.empty(2, 200_001)
            COMBINES[name](contributions, fragment)(0, out, scratch)
            found.append(out)
    finally:
        torch.set_num_threads(default)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", COMBINES)
def test_the_order_of_the_contributions_counts_for_no_more_than_rounding(name: str):
    vectors, weights = [gaussian(m) for m in range(6)], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    backwards = combined(name, vectors[::-1], weights[::-1])
    torch.testing.assert_close(backwards, combined(name, vectors, weights), rtol=0, atol=2e-6)
    if name == "median":
        assert torch.equal(backwards, combined(name, vectors, weights))


@pytest.mark.parametrize("name", COMBINES)
def test_weights_count_where_the_settings_say_so_and_then_only_their_ratio(name: str):
    vectors = [gaussian(m) for m in range(4)]
    found = combined(name, vectors, [1, 2, 4, 5])
    assert torch.equal(combined(name, vectors, [4096, 8192, 16384, 20480]), found)
    counts = OuterSettings.model_validate({"combine": name}).uses_weights
    assert torch.equal(combined(name, vectors, [5, 4, 2, 1]), found) != counts


@pytest.mark.parametrize("name", COMBINES)
@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("weight", [1.0, 3.0, 0.1, 1e-30])
def test_a_single_contribution_counts_exactly_once_whatever_its_weight(name: str, codec: str, weight: float):
    found, alone = combined(name, [gaussian(0)], [weight], codec), decoded([gaussian(0)], codec)[0]
    if name == "radial":
        np.testing.assert_allclose(found.numpy(), alone, rtol=1e-6, atol=0)
    else:
        assert np.array_equal(found.double().numpy(), alone)


@pytest.mark.parametrize("name", COMBINES)
def test_no_more_than_a_chunk_is_decoded_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(combine_module, "CHUNK_VALUES", 512)
    float32, lengths = get_codec("float32"), set[int]()

    class Watched:
        name = "float32"

        def decode_(self, payload: torch.Tensor, start: int, num_values: int, out: torch.Tensor, factor: float = 1.0):
            lengths.add(out.numel())
            assert start % 256 == 0
            float32.decode_(payload, start, num_values, out, factor)

    payloads = [encoded(gaussian(m), float32) for m in range(3)]
    write_ = COMBINES[name](Contributions(payloads, [1, 1, 1], Watched(), NUM_VALUES), FRAGMENT)  # type: ignore[arg-type]
    for start in range(0, NUM_VALUES, 512):
        out, scratch = torch.empty(2, min(512, NUM_VALUES - start))
        write_(start, out, scratch)
    assert max(lengths) == 512


@pytest.mark.parametrize(
    "weights", [[], [1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [math.nan, 1.0], [1.0, math.inf], [1e308, 1e308]]
)
def test_weights_that_mean_nothing_are_refused(weights: list[float]):
    with pytest.raises(ValueError, match="one positive weight each"):
        combined("mean", [gaussian(0), gaussian(1)], weights)


# ---- what each one is for ----


def test_radial_keeps_the_mean_length_of_each_tensor_but_of_embeddings():
    vectors, weights = [gaussian(m) for m in range(8)], [1.0] * 8
    found, mean = combined("radial", vectors, weights), combined("mean", vectors, weights)
    expected = radial_by_hand(decoded(vectors, "float32"), np.array(weights))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=4e-6)
    for slot in FRAGMENT.slots:
        if is_embedding(slot.name, slot.shape):
            assert torch.equal(slot.of(found), slot.of(mean))
        else:
            mean_length = sum(float(slot.of(vector).norm()) for vector in vectors) / 8
            assert float(slot.of(found).norm()) == pytest.approx(mean_length, rel=1e-5)
            assert float(slot.of(mean).norm()) < 0.6 * mean_length


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ([torch.zeros(NUM_VALUES)] * 2, 0.0),
        ([gaussian(0), -3.0 * gaussian(0)], 0.0),  # directions cancel
        ([gaussian(0), torch.zeros(NUM_VALUES)], 0.5),  # dir(0) = 0: only the length is halved
        ([gaussian(0) * 1e-44, gaussian(0)], 0.5),  # too short to have a direction in float32
    ],
    ids=["zeros", "opposite", "one zero", "one nearly zero"],
)
def test_radial_has_no_direction_where_there_is_none(vectors: list[torch.Tensor], expected: float):
    found, body = combined("radial", vectors, [1.0, 1.0]), FRAGMENT.slots[1]
    torch.testing.assert_close(body.of(found), expected * body.of(gaussian(0)), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.embed_tokens.weight", (256, 64), True),
        ("lm_head.weight", (256, 64), True),
        ("position_embedding", (128, 64), True),
        ("lm_head.bias", (256,), False),
        ("embed_norm", (64,), False),
        ("layers.0.mlp.weight", (64, 64), False),
        ("patch_embed", (64, 3, 4, 4), False),
    ],
)
def test_embeddings_are_two_dimensional_and_named_so(name: str, shape: tuple[int, ...], expected: bool):
    assert is_embedding(name, shape) is expected


def test_one_wild_island_moves_the_robust_combines_no_further_than_an_honest_one_could():
    honest, wild = [gaussian(m) for m in range(4)], gaussian(9) * 1e6
    vectors, weights = [*honest[:2], wild, *honest[2:]], [1.0] * 5
    stacked = torch.stack(honest)
    for name in ("trimmed_mean", "median"):
        found = combined(name, vectors, weights)
        assert (found >= stacked.min(0).values).all()
        assert (found <= stacked.max(0).values).all()
    longest = max(float(vector.norm()) for vector in honest)
    assert float(combined("clipped_mean", vectors, weights).norm()) <= longest
    assert float(combined("mean", vectors, weights).norm()) > 1000 * longest


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("name", "honest", "liars"), [("median", 5, 4), ("median", 4, 3), ("trimmed_mean", 4, 1)])
def test_fewer_than_the_combine_bears_move_no_coordinate_past_the_honest_ones_though_they_collude(
    name: str, honest: int, liars: int, seed: int
):
    """They send one vector, against the honest ones' mean, of an ordinary length or a hundred times that."""
    vectors = [gaussian(10 * seed + m) for m in range(honest)]
    stacked = torch.stack(vectors)
    for factor in (1.0, 100.0):
        lie = -stacked.mean(0) * factor * float(vectors[0].norm() / stacked.mean(0).norm())
        found = combined(name, [lie] * liars + vectors, [1.0] * (liars + honest))
        assert (found >= stacked.min(0).values).all()
        assert (found <= stacked.max(0).values).all()


@pytest.mark.parametrize(("honest", "liars"), [(5, 4), (3, 2)])
def test_a_minority_that_colludes_makes_a_clipped_mean_no_longer_than_an_honest_contribution(honest: int, liars: int):
    vectors = [gaussian(m) for m in range(honest)]
    lies = [gaussian(77) * 1e6] * liars
    longest = max(float(vector.norm()) for vector in vectors)
    assert float(combined("clipped_mean", lies + vectors, [1.0] * (honest + liars)).norm()) <= longest


def test_equal_norms_are_not_clipped():
    vectors, weights = [gaussian(0), -gaussian(0), gaussian(0).flip(0)], [1.0, 2.0, 3.0]
    torch.testing.assert_close(
        combined("clipped_mean", vectors, weights), combined("mean", vectors, weights), rtol=0, atol=1e-7
    )
