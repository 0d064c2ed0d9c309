"""Codecs: how near, how small, and that every chunk and machine says the same."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diloco_ray.algorithm.codecs import BLOCK_VALUES, CODEC_NAMES, get_codec
from diloco_ray.errors import ConfigError

POWERS = 2.0 ** np.arange(7)
LEVELS = {
    "int8": np.arange(-127.0, 128.0),
    "int4": np.arange(-7.0, 8.0),
    "e3m0": np.concatenate([-POWERS[::-1], [0.0], POWERS]),
    "ternary": np.array([-1.0, 0.0, 1.0]),
}
BLOCK_CODECS = [*LEVELS, "topk"]
TINY = 2.0**-126

finite_vectors = st.integers(1, 3 * BLOCK_VALUES + 1).flatmap(
    lambda n: arrays(np.float32, n, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
)


def encode(name: str, values: torch.Tensor) -> torch.Tensor:
    payload = torch.zeros(get_codec(name).num_bytes(values.numel()), dtype=torch.uint8)
    get_codec(name).encode_(values, payload, 0, values.numel())
    return payload


def decode(name: str, payload: torch.Tensor, num_values: int) -> torch.Tensor:
    out = torch.full((num_values,), torch.nan)
    get_codec(name).decode_(payload, 0, num_values, out)
    return out


def gaussian(num_values: int, scale: float = 1e-3) -> torch.Tensor:
    return torch.randn(num_values, generator=torch.Generator().manual_seed(num_values)) * scale


@pytest.mark.parametrize("name", LEVELS)
@settings(deadline=None, max_examples=60)
@given(finite_vectors)
def test_a_block_codec_errs_by_no_more_than_the_nearest_level(name: str, x: np.ndarray):
    decoded = decode(name, encode(name, torch.from_numpy(x)), x.size).numpy().astype(np.float64)
    levels = LEVELS[name]
    for first in range(0, x.size, BLOCK_VALUES):
        block = x[first : first + BLOCK_VALUES].astype(np.float64)
        largest = np.abs(block).max()
        nearest = np.abs(block[:, None] - levels * largest / levels.max()).min(1)
        error = np.abs(block - decoded[first : first + BLOCK_VALUES])
        slack = largest * 2.0**-15 + levels.max() * TINY  # cleared bits of the scale; blocks that flush to zero
        assert np.all(error <= nearest + slack)


@pytest.mark.parametrize("name", LEVELS)
def test_the_middle_between_two_levels_is_where_the_code_changes(name: str):
    levels = LEVELS[name].astype(np.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    for side, expected in ((-np.inf, levels[:-1]), (np.inf, levels[1:])):
        x = np.full(-(-(middles.size + 1) // BLOCK_VALUES) * BLOCK_VALUES, levels.max(), np.float32)
        x[: middles.size] = np.nextafter(middles, np.float32(side))
        assert decode(name, encode(name, torch.from_numpy(x)), x.size)[: middles.size].tolist() == expected.tolist()


@pytest.mark.parametrize(("name", "bits"), [("float32", 24), ("bfloat16", 8), ("float16", 11)])
@given(x=finite_vectors)
@settings(deadline=None, max_examples=40)
def test_a_float_codec_errs_by_at_most_half_a_last_bit(name: str, bits: int, x: np.ndarray):
    x = np.clip(x, -6e4, 6e4)
    decoded = decode(name, encode(name, torch.from_numpy(x)), x.size).numpy().astype(np.float64)
    smallest_step = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 0.0}[name]
    assert np.all(np.abs(x - decoded) <= np.maximum(np.abs(x.astype(np.float64)) * 2.0**-bits, smallest_step / 2))


@pytest.mark.parametrize("name", CODEC_NAMES)
@settings(deadline=None, max_examples=60)
@given(finite_vectors)
def test_encoding_what_was_decoded_gives_the_same_bytes(name: str, x: np.ndarray):
    if name == "bfloat16":
        x = np.clip(x, -3e38, 3e38)
    payload = encode(name, torch.from_numpy(x))
    decoded = decode(name, payload, x.size)
    assert torch.isfinite(decoded).all()
    assert torch.equal(encode(name, decoded), payload)


@pytest.mark.parametrize("name", BLOCK_CODECS)
def test_idempotence_over_many_scales(name: str):
    num_blocks = 20_000
    x = gaussian(num_blocks * BLOCK_VALUES).view(num_blocks, -1)
    x *= torch.logspace(-30, 30, num_blocks).unsqueeze(1)
    payload = encode(name, x.view(-1))
    assert torch.equal(encode(name, decode(name, payload, x.numel())), payload)


@pytest.mark.parametrize("power", [-100, -9, 0, 13])
@pytest.mark.parametrize("name", CODEC_NAMES)
def test_values_that_a_codec_can_write_come_back_exactly(name: str, power: int):
    """Levels times a power of two; of topk eight in a block; and what has as many bits as the float format."""
    x = np.zeros((4, BLOCK_VALUES), np.float32)
    if name == "topk":
        x[:, 5::32] = [127, -127, 1, -1, 64, -3, 100, 77]
    else:
        x.flat = np.resize(LEVELS.get(name, np.arange(-127.0, 128.0)), x.size)
    if name == "float16":
        power = min(max(power, -24), 9)  # its range
    values = torch.from_numpy(x).view(-1) * 2.0**power
    assert torch.equal(decode(name, encode(name, values), values.numel()), values)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_a_zero_block_decodes_to_zero_and_block_scales_are_independent(name: str):
    x = torch.cat([gaussian(256, 1e-6), torch.zeros(256), gaussian(256, 1e4), torch.full((256,), 1e-40)])
    payload = encode(name, x)
    decoded = decode(name, payload, x.numel())
    assert not decoded[256:512].any()
    for first in (0, 512):
        block = slice(first, first + 256)
        bound = {"e3m0": 0.25, "ternary": 1.0, "topk": 0.95}.get(name, 0.15)
        assert (x[block] - decoded[block]).norm() < bound * x[block].norm()
    if name in BLOCK_CODECS:
        assert not decoded[768:].any()
        assert payload[:16].view(torch.float32).ne(0).tolist() == [True, False, True, False]


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("position", [0, 299, 300])
def test_a_value_that_is_not_finite_is_seen_after_decoding_and_spares_other_blocks(
    name: str, bad: float, position: int
):
    x = gaussian(301)
    x[position] = bad
    decoded = decode(name, encode(name, x), x.numel())
    assert not torch.isfinite(decoded[position])
    elsewhere = slice(256, None) if position < 256 else slice(0, 256)
    assert torch.isfinite(decoded[elsewhere]).all()


def test_float16_saturates_what_is_finite():
    x = torch.tensor([1e38, -7e4, 65504.0, 65519.0, -0.0])
    assert decode("float16", encode("float16", x), 5).tolist() == [65504.0, -65504.0, 65504.0, 65504.0, -0.0]


def test_the_bytes_of_int8_and_int4_are_as_documented():
    x = torch.zeros(300)
    x[0], x[1], x[256], x[257] = 127.0, -64.0, -3.5, 1.0
    int8 = encode("int8", x).numpy()
    assert int8.size == 2 * (4 + 256)
    scales = int8[:8].view("<f4")
    assert scales[0] == 1.0
    assert scales[1] == pytest.approx(3.5 / 127, rel=2**-16)
    assert int8[8:].view(np.int8)[[0, 1, 2, 256, 257, 300]].tolist() == [127, -64, 0, -127, 36, 0]
    int4 = encode("int4", x).numpy()
    assert int4.size == 2 * (4 + 128)
    assert int4[8] == ((8 - 4) << 4) | (
        8 + 7
    )  # low nibble first: codes 7 and round(-64 * 7 / 127) = -4, stored as c + 8
    assert int4[8 + 128] == ((8 + 2) << 4) | (8 - 7)


def test_the_bytes_of_e3m0_and_ternary_are_as_documented():
    x = torch.zeros(300)
    x[:6] = torch.tensor([64.0, -1.0, 0.4, -0.6, 11.0, -13.0])
    e3m0 = encode("e3m0", x).numpy()
    assert e3m0.size == 2 * (4 + 128)
    assert e3m0[:8].view("<f4").tolist() == [1.0, 0.0]
    nibbles = [7, 8 + 1, 0, 8 + 1, 4, 8 + 5]  # k of 2^(k-1), and 8 for the sign; low half first
    assert e3m0[8:11].tolist() == [low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2])]
    assert not e3m0[11:].any()
    x[:6] = torch.tensor([1.0, -0.75, 0.4, 0.6, -1.0, -0.5])
    ternary = encode("ternary", x).numpy()
    assert ternary.size == 2 * (4 + 64)
    assert ternary[:8].view("<f4").tolist() == [1.0, 0.0]
    assert ternary[8:10].tolist() == [2 | 0 << 2 | 1 << 4 | 2 << 6, 0 | 1 << 2 | 1 << 4 | 1 << 6]  # c + 1
    assert set(ternary[10:].tolist()) == {0b01010101}


def topk_by_hand(x: np.ndarray) -> np.ndarray:
    """The eight largest magnitudes of each block, the first of equal ones, to the nearest of 127 levels; float64."""
    found = np.zeros(x.size)
    for first in range(0, x.size, BLOCK_VALUES):
        block = x[first : first + BLOCK_VALUES].astype(np.float64)
        scale = np.abs(block).max() / 127
        kept = np.argsort(-np.abs(block), kind="stable")[:8]
        if scale >= TINY:
            found[first + kept] = np.round(block[kept] / scale) * scale
    return found


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 1000), top=st.sampled_from([1, 3, 30, 3000]))
def test_topk_keeps_the_eight_largest_of_a_block_to_int8(seed: int, size: int, top: int):
    """With few different values there are ties, within the eight and at their border."""
    x = np.random.default_rng(seed).integers(-top, top + 1, size).astype(np.float32)
    decoded = decode("topk", encode("topk", torch.from_numpy(x)), size).numpy().astype(np.float64)
    expected = topk_by_hand(x)
    largest = np.repeat([np.abs(x[i : i + 256]).max() for i in range(0, size, 256)], 256)[:size]
    assert np.array_equal(decoded != 0, expected != 0)
    kept = decoded != 0
    assert np.all(np.abs(decoded - x)[kept] <= largest[kept] * (0.5 / 127 + 2.0**-15))


def test_the_bytes_of_topk_are_as_documented():
    x = torch.zeros(600)
    x[torch.arange(20, 9, -1)] = torch.tensor([127.0, -1.0, 3.0, 60.4, -3.0, 1.0, 2.0, 1.0, 1.0, 5.0, -7.0])
    x[300], x[511] = 12.7, 0.0499  # the second one's code is 0: the first zeros fill up
    payload = encode("topk", x).numpy()
    assert payload.size == 3 * (4 + 16)
    assert payload[:4].view("<f4")[0] == 1.0
    assert payload[12:28].tolist() == [10, 11, 12, 14, 16, 17, 18, 20, 256 - 7, 5, 1, 2, 256 - 3, 60, 3, 127]
    assert payload[28:44].tolist() == [0, 1, 2, 3, 4, 5, 6, 44] + [0] * 7 + [127]
    assert payload[44:].tolist() == [*range(8)] + [0] * 8
    assert payload[8:12].view("<f4")[0] == 0.0


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("num_values", [0, 1, 255, 256, 257, 5000])
def test_chunks_of_any_size_write_and_read_the_same(name: str, num_values: int):
    codec, x = get_codec(name), gaussian(num_values)
    before = x.clone()
    whole = encode(name, x)
    for chunk in (256, 512, 1024):
        pieces, out = torch.zeros_like(whole), torch.empty(num_values)
        for start in range(0, num_values, chunk):
            codec.encode_(x[start : start + chunk], pieces, start, num_values)
        for start in range(0, num_values, chunk):
            codec.decode_(pieces, start, num_values, out[start : start + chunk])
        assert torch.equal(pieces, whole)
        assert torch.equal(out, decode(name, whole, num_values))
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_a_factor_scales_what_is_decoded(name: str):
    payload, out = encode(name, gaussian(1000)), torch.empty(1000)
    get_codec(name).decode_(payload, 0, 1000, out, 0.3)
    torch.testing.assert_close(out, decode(name, payload, 1000) * 0.3, rtol=1e-6, atol=0)
    get_codec(name).decode_(payload, 0, 1000, out, 0.25)
    assert torch.equal(out, decode(name, payload, 1000) * 0.25)


@pytest.mark.parametrize("name", BLOCK_CODECS)
def test_a_chunk_that_cuts_a_block_is_refused(name: str):
    payload = torch.zeros(get_codec(name).num_bytes(1000), dtype=torch.uint8)
    for start, length in ((128, 256), (0, 300)):
        with pytest.raises(ValueError, match="blocks of 256"):
            get_codec(name).encode_(torch.zeros(length), payload, start, 1000)


@pytest.mark.parametrize(
    ("name", "bytes_per_value"),
    [
        ("float32", 4),
        ("float16", 2),
        ("bfloat16", 2),
        ("int8", 1),
        ("int4", 0.5),
        ("e3m0", 0.5),
        ("ternary", 0.25),
        ("topk", 16 / 256),
    ],
)
def test_a_payload_is_within_two_percent_of_its_bits(name: str, bytes_per_value: float):
    overhead = 4 / 256 if name in BLOCK_CODECS else 0
    assert get_codec(name).num_bytes(1_000_000) == pytest.approx(1_000_000 * (bytes_per_value + overhead), rel=1e-3)


def test_an_unknown_codec_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown codec 'in8'; did you mean 'int8'"):
        get_codec("in8")
    expected = ["float32", "bfloat16", "float16", "int8", "int4", "e3m0", "ternary", "topk"]
    assert [get_codec(name).name for name in CODEC_NAMES] == expected
