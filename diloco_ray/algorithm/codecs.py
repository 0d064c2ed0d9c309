"""Codecs: outer gradients as bytes, the same bytes up (island to coordinator) and down (log to every replica).

Decoding is part of the definition of the global model: every replica decodes the same bytes to the same float32 bits.
So decode_ uses only operations that IEEE 754 rounds correctly, one at a time: no fused multiply-add, no reduction.
Block-wise absmax after Dettmers et al. (arXiv 2110.02861, section 2.1); that four bits are enough for outer gradients,
if these are summed in float32, is Streaming DiLoCo's (arXiv 2501.18512), whose format is e3m0. Two bits are not enough
(arXiv 2604.21428): ternary is the negative control. topk, after SparseLoCo, sends only the largest values and lives on
the error feedback of its sender. A codec does not know what the values mean.

A vector is written chunk by chunk, into one payload. For a block codec that payload is

    [scale: float32 for each block] [codes: BLOCK_VALUES for each block, the last block filled up with zeros]

and everything is little endian, as on all machines this runs on.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink, pad

from diloco_ray.errors import ConfigError

BLOCK_VALUES = 256
CHUNK_VALUES = (
    2048 * BLOCK_VALUES
)  # worked on at a time: the five vectors of 2 MiB that a step then needs stay in cache

_FLOAT16_MAX = 65504.0
_SMALLEST_NORMAL = 2.0**-126
_CLEAR_LOW_7_BITS = -(2**7)
_CLEAR_LOW_16_BITS = -(2**16)
_NUM_LARGEST = 8  # of a block's 256 values, with topk
_REVERSED_INDICES = torch.arange(BLOCK_VALUES - 1, -1, -1, dtype=torch.int32)


class Codec(Protocol):
    """A way to write a vector of float32 values as bytes.

    encode_ writes `values`, (m,) float32, as the values start .. start + m of a vector of num_values into `payload`,
    (num_bytes(num_values),) uint8; decode_ reads them into `out`, (m,) float32, times `factor`: a block codec scales a
    block's scale, which costs 1/256 of scaling its values. start is a multiple of BLOCK_VALUES, and so is m except at
    the vector's end. encode_ leaves `values` as they were. Encoding decoded values gives the same bytes again. A value
    that is not finite decodes to one (or, in a block, to many) that is not finite.

    sections are the views of the payload that hold the num_part values from start on, as bytes: laid end to end they
    are the payload of these values alone.
    """

    @property
    def name(self) -> str: ...
    def num_bytes(self, num_values: int) -> int: ...
    def encode_(self, values: Tensor, payload: Tensor, start: int, num_values: int) -> None: ...
    def decode_(self, payload: Tensor, start: int, num_values: int, out: Tensor, factor: float = 1.0) -> None: ...
    def sections(self, payload: Tensor, start: int, num_part: int, num_values: int) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class FloatCodec:
    """Each value rounded to nearest in a shorter float format (or kept, as float32)."""

    name: str
    dtype: torch.dtype

    def num_bytes(self, num_values: int) -> int:
        return num_values * self.dtype.itemsize

    def encode_(self, values: Tensor, payload: Tensor, start: int, num_values: int) -> None:
        """float16 ends at 65504: larger finite values saturate there, and what is not finite becomes NaN."""
        if self.dtype is torch.float16:
            zero_or_nan = values * 0.0  # NaN where the value is not finite; a zero keeps the value's sign
            values = values.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).add_(zero_or_nan)
        payload.view(self.dtype)[start : start + values.numel()].copy_(values)

    def decode_(self, payload: Tensor, start: int, num_values: int, out: Tensor, factor: float = 1.0) -> None:
        out.copy_(payload.view(self.dtype)[start : start + out.numel()])
        if factor != 1.0:
            out.mul_(factor)

    def sections(self, payload: Tensor, start: int, num_part: int, num_values: int) -> tuple[Tensor, ...]:
        return (payload[start * self.dtype.itemsize : (start + num_part) * self.dtype.itemsize],)


@dataclass(frozen=True)
class BlockCodec:
    """Levels c in [-q, q] and one float32 scale s for each block of 256 values; x is decoded as c s.

        s = max|x| / q,   low 7 bits of its mantissa cleared        c = the level nearest to x / s

    The levels are integers: all of them (int8, int4 and, with q = 1, ternary), so that |x - c s| <= max|x| / 2q, up to
    the rounding of x / s; or 0 and the powers of two (e3m0). With topk c = 0 but for the eight largest |x|. The cleared
    bits make c s exact in float32, hence encoding what was decoded gives the same c and s. A block whose scale would
    not be a normal float32, that is max|x| < q 2^-126, is a block of zeros: s = 0.
    """

    name: str
    largest_level: int  # q
    num_bytes_per_block: int
    pack_: Callable[[Tensor, Tensor], None]  # x / s, (m,) float32, is lost -> codes of the nearest levels, uint8
    unpack_: Callable[[Tensor, Tensor], None]  # codes, uint8 -> levels, (m,) float32

    def num_bytes(self, num_values: int) -> int:
        return _num_blocks(num_values) * (4 + self.num_bytes_per_block)

    def encode_(self, values: Tensor, payload: Tensor, start: int, num_values: int) -> None:
        scales, codes = self._scales_and_codes(payload, start, values.numel(), num_values)
        num_missing = -values.numel() % BLOCK_VALUES
        blocks = (pad(values, (0, num_missing)) if num_missing else values).view(-1, BLOCK_VALUES)
        scratch = torch.abs(blocks)
        torch.amax(scratch, 1, out=scales)
        scales.div_(self.largest_level).view(torch.int32).bitwise_and_(_CLEAR_LOW_7_BITS)
        is_normal = scales >= _SMALLEST_NORMAL
        inverse = is_normal / scales.clamp(min=_SMALLEST_NORMAL)
        scales.mul_(is_normal)  # NaN stays NaN
        torch.mul(blocks, inverse.unsqueeze(1), out=scratch)
        self.pack_(scratch.view(-1), codes)

    def decode_(self, payload: Tensor, start: int, num_values: int, out: Tensor, factor: float = 1.0) -> None:
        scales, codes = self._scales_and_codes(payload, start, out.numel(), num_values)
        num_missing = -out.numel() % BLOCK_VALUES
        decoded = out.new_empty(out.numel() + num_missing) if num_missing else out
        self.unpack_(codes, decoded)
        decoded.view(-1, BLOCK_VALUES).mul_((scales if factor == 1.0 else scales * factor).unsqueeze(1))
        if num_missing:
            out.copy_(decoded[: out.numel()])

    def sections(self, payload: Tensor, start: int, num_part: int, num_values: int) -> tuple[Tensor, Tensor]:
        """The scales, four bytes a block, and the codes."""
        if start % BLOCK_VALUES or (num_part % BLOCK_VALUES and start + num_part != num_values):
            raise ValueError(f"values {start}..{start + num_part} of {num_values} are not blocks of {BLOCK_VALUES}")
        split = 4 * _num_blocks(num_values)
        first, last = start // BLOCK_VALUES, _num_blocks(start + num_part)
        codes = payload[split + first * self.num_bytes_per_block : split + last * self.num_bytes_per_block]
        return payload[4 * first : 4 * last], codes

    def _scales_and_codes(self, payload: Tensor, start: int, num_part: int, num_values: int) -> tuple[Tensor, Tensor]:
        scales, codes = self.sections(payload, start, num_part, num_values)
        return scales.view(torch.float32), codes


def _num_blocks(num_values: int) -> int:
    return -(-num_values // BLOCK_VALUES)


def _pack_bytes(ratios: Tensor, codes: Tensor) -> None:
    codes.view(torch.int8).copy_(ratios.round_())


def _unpack_bytes(codes: Tensor, out: Tensor) -> None:
    out.copy_(codes.view(torch.int8))


def _pack_nibbles(ratios: Tensor, codes: Tensor) -> None:
    """c + 8 in four bits, the even value in the low half of a byte: seen as 16 bits, 0x0h0l | 0x00h0 ends in hl."""
    pairs = ratios.round_().to(torch.int8).add_(8).view(torch.int16)
    codes.copy_(pairs.bitwise_or_(pairs >> 4))


def _unpack_nibbles(codes: Tensor, out: Tensor) -> None:
    """The way back: (0x00hl | 0x0hl0) & 0x0f0f = 0x0h0l."""
    pairs = codes.to(torch.int16)
    pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F)
    out.copy_(pairs.view(torch.int8).sub_(8))


def _pack_powers(ratios: Tensor, codes: Tensor) -> None:
    """Sign and three bits k of exponent, for the levels 0 and 2^(k-1), k = 1..7; the even value in a byte's low half.

    With the level 1 moved to 2^-14, the smallest normal float16, these are its sign and lowest exponent bits. Below it
    float16 is linear, so half a mantissa added carries into k from half-way on, next to zero too; half-way itself goes
    away from zero. Only eight bits of mantissa are kept before, so that the step to float16 does not round.
    """
    halves = ratios.mul_(2.0**-14).view(torch.int32).bitwise_and_(_CLEAR_LOW_16_BITS).view(torch.float32).half()
    fields = halves.view(torch.int16).add_(0x0200).bitwise_right_shift_(10)  # ssssssss sss00kkk
    pairs = fields.to(torch.int8).view(torch.int16)  # two values' sss00kkk
    outer = pairs & -0x7FF9  # the first one's k, the second one's sign
    outer.bitwise_or_(outer >> 8)
    codes.copy_(pairs.bitwise_right_shift_(4).bitwise_and_(0x78).bitwise_or_(outer))


def _unpack_powers(codes: Tensor, out: Tensor) -> None:
    """The way back, two values in 32 bits: 0x000000hl -> 0x000h000l -> two float16."""
    nibbles = codes.to(torch.int32)
    nibbles.bitwise_or_(nibbles << 12).bitwise_and_(0x000F000F)
    pairs = (nibbles & 0x00080008).bitwise_left_shift_(12).bitwise_or_(nibbles.bitwise_and_(0x00070007) << 10)
    out.copy_(pairs.view(torch.float16)).mul_(2.0**14)


def _pack_crumbs(ratios: Tensor, codes: Tensor) -> None:
    """c + 1 in two bits, the first of four values in a byte's lowest: 0x0d0c0b0a ends, folded twice, in ddccbbaa."""
    fours = ratios.round_().to(torch.int8).add_(1).view(torch.int32)
    fours.bitwise_or_(fours >> 6)
    codes.copy_(fours.bitwise_or_(fours >> 12))


def _unpack_crumbs(codes: Tensor, out: Tensor) -> None:
    fours = codes.to(torch.int32)
    fours.bitwise_or_(fours << 12)
    fours.bitwise_or_(fours << 6).bitwise_and_(0x03030303)
    out.copy_(fours.view(torch.int8).sub_(1))


def _pack_largest(ratios: Tensor, codes: Tensor) -> None:
    """For each block the indices of its eight largest |x|, uint8 and rising, then their eight codes, int8.

    They are found by integer keys that no two values of a block share: the magnitude's bits, the lowest eight of them
    replaced by 255 - index. So of magnitudes that differ by less than a part in 2^15 the first ones are taken. A value
    whose code is 0 counts as 0, so that zeros fill up a block with fewer than eight codes as they do after decoding.
    """
    blocks, sections = ratios.view(-1, BLOCK_VALUES), codes.view(-1, 2 * _NUM_LARGEST)
    keys = hardshrink(blocks, 0.5).view(torch.int32).bitwise_and_(0x7FFFFF00).bitwise_or_(_REVERSED_INDICES)
    largest = np.partition(keys.numpy(), -_NUM_LARGEST, axis=1)[:, -_NUM_LARGEST:]  # torch.topk: eight times as long
    indices = torch.tensor(np.sort(BLOCK_VALUES - 1 - (largest & 0xFF), axis=1), dtype=torch.int64)
    sections[:, :_NUM_LARGEST] = indices
    sections[:, _NUM_LARGEST:].view(torch.int8).copy_(blocks.gather(1, indices).round_())


def _unpack_largest(codes: Tensor, out: Tensor) -> None:
    """Indices that a damaged payload repeats are taken in some order; those of an encoder are all different."""
    sections = codes.view(-1, 2 * _NUM_LARGEST)
    values = sections[:, _NUM_LARGEST:].view(torch.int8).float()
    out.zero_().view(-1, BLOCK_VALUES).scatter_(1, sections[:, :_NUM_LARGEST].long(), values)


_CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        FloatCodec("float32", torch.float32),
        FloatCodec("bfloat16", torch.bfloat16),
        FloatCodec("float16", torch.float16),
        BlockCodec("int8", 127, BLOCK_VALUES, _pack_bytes, _unpack_bytes),
        BlockCodec("int4", 7, BLOCK_VALUES // 2, _pack_nibbles, _unpack_nibbles),
        BlockCodec("e3m0", 64, BLOCK_VALUES // 2, _pack_powers, _unpack_powers),
        BlockCodec("ternary", 1, BLOCK_VALUES // 4, _pack_crumbs, _unpack_crumbs),
        BlockCodec("topk", 127, 2 * _NUM_LARGEST, _pack_largest, _unpack_largest),
    )
}
CODEC_NAMES: tuple[str, ...] = tuple(_CODECS)
# topk is for the uplink alone: islands' largest values lie in different places, so few of their mean would be left.
DOWNLINK_CODEC_NAMES: tuple[str, ...] = tuple(name for name in CODEC_NAMES if name != "topk")


def get_codec(name: str) -> Codec:
    """The codec of this name; ConfigError that names the nearest one when there is none."""
    if name in _CODECS:
        return _CODECS[name]
    nearest = difflib.get_close_matches(name, CODEC_NAMES, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"unknown codec {name!r}; did you mean {nearest!r}?",
        where="codec",
        remedy=f"choose one of {', '.join(CODEC_NAMES)}",
    )
