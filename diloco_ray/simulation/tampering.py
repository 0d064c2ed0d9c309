"""What may become of a contribution on its way: damage, forgery, repetition."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from diloco_ray.algorithm.codecs import BLOCK_VALUES, Codec, get_codec
from diloco_ray.coordination.membership import MOST
from diloco_ray.coordination.messages import Contribution
from diloco_ray.ids import sha256_hex
from diloco_ray.simulation.scenario import BadPayload
from diloco_ray.transport.protocol import Bytes

Sent = tuple[Contribution, Bytes]
# Refused for its norm, but of an island whose learning rate has just begun to rise: no further than others go later.
HUGE = 2.0**10
PICKLED = b"cposix\nsystem\n(S'echo a pickle was loaded'\ntR."


def tampered(how: BadPayload, c: Contribution, payload: Bytes, before: Sequence[Sent]) -> list[Sent]:
    """What is sent instead; the last one is the one whose answer counts. before: what the same process has sent."""
    match how:
        case "nan":
            return [_sealed(c, np.full_like(payload, 0xFF))]
        case "huge":
            return [_sealed(c, _scaled(payload, HUGE, get_codec(c.codec)))]
        case "zero":
            return [_sealed(c, np.zeros_like(payload))]
        case "terabyte":
            return [(replace(c, payload_bytes=10**12), payload)]
        case "inflated":
            return [(replace(c, inner_steps=10**9, metrics={**c.metrics, "tokens": MOST}), payload)]
        case "foreign":
            return [(replace(c, run_id="another"), payload), (c, payload)]
        case "stale":
            return [(replace(c, base_version=0), payload), (c, payload)]
        case "short":
            return [_sealed(c, payload[:-1].copy())]
        case "long":
            return [_sealed(c, np.append(payload, payload))]
        case "pickle":
            return [_sealed(c, np.frombuffer(PICKLED, np.uint8).copy())]
        case "other_digest":
            return [(c, payload ^ np.uint8(1))]
        case "replayed":
            return [*before[-1:], (c, payload)]
        case "forged":
            forger = replace(c, island="island-00" if c.island != "island-00" else "island-01")
            return [(forger, payload), (c, payload)]
        case "doubled":
            return [(c, payload)] * 20
        case "conflict":
            return [(c, payload), _sealed(c, payload ^ np.uint8(1)), (c, payload)]


def _scaled(payload: Bytes, factor: float, codec: Codec) -> Bytes:
    """The outer gradient in the payload, so many times as long: (num_bytes,) uint8 as before."""
    num_values = payload.size * BLOCK_VALUES // codec.num_bytes(BLOCK_VALUES)  # the last block's filling among them
    scaled, values = torch.from_numpy(payload.copy()), torch.empty(num_values)
    codec.decode_(scaled, 0, num_values, values, factor)
    codec.encode_(values, scaled, 0, num_values)
    return scaled.numpy()


def _sealed(c: Contribution, payload: Bytes) -> Sent:
    """With a header that fits: only its form or its values show what it is."""
    return replace(c, payload_sha256=sha256_hex(payload.data), payload_bytes=payload.size), payload
