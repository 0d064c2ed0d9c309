"""Error feedback, up and down: what a codec leaves out now is sent later."""

import numpy as np
import pytest
import torch

from diloco_ray.algorithm import outer_gradient, replica
from diloco_ray.algorithm.codecs import CODEC_NAMES, Codec, get_codec
from diloco_ray.algorithm.combine import median
from diloco_ray.algorithm.fragments import partition
from diloco_ray.algorithm.outer_gradient import encode_outer_gradient_
from diloco_ray.algorithm.outer_optimizer import SGD, Nesterov
from diloco_ray.algorithm.replica import Replica

NUM_VALUES = 3001
LAYOUT = partition({"a": (40, 50), "b": (1001,)})


def gaussian(seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(NUM_VALUES, generator=torch.Generator().manual_seed(seed)) * scale


def quantised(codec: Codec, values: np.ndarray) -> np.ndarray:
    """Q(values), float32."""
    payload = torch.zeros(codec.num_bytes(values.size), dtype=torch.uint8)
    codec.encode_(torch.from_numpy(values), payload, 0, values.size)
    return decoded(codec, payload)


def decoded(codec: Codec, payload: torch.Tensor) -> np.ndarray:
    out = torch.empty(NUM_VALUES)
    codec.decode_(payload, 0, NUM_VALUES, out)
    return out.numpy()


def new_payload(codec: Codec) -> torch.Tensor:
    return torch.zeros(codec.num_bytes(NUM_VALUES), dtype=torch.uint8)


# ---- up ----


@pytest.mark.parametrize("decay", [0.95, 1.0])
@pytest.mark.parametrize("name", CODEC_NAMES)
def test_it_is_the_equation_of_sparseloco(name: str, decay: float, monkeypatch: pytest.MonkeyPatch):
    """e <- beta e + delta, Q(e), e <- e - Q(e): in NumPy with float32, which rounds as torch does."""
    monkeypatch.setattr(outer_gradient, "CHUNK_VALUES", 512)
    codec, residual, e = get_codec(name), torch.zeros(NUM_VALUES), np.zeros(NUM_VALUES, np.float32)
    payload = new_payload(codec)
    for step in range(6):
        base, island = gaussian(2 * step), gaussian(2 * step + 1)
        before = base.clone(), island.clone()
        stats = encode_outer_gradient_(base, island, codec, payload, residual, decay)
        delta = base.numpy() - island.numpy()
        e = np.float32(decay) * e + delta
        sent = quantised(codec, e)
        assert np.array_equal(decoded(codec, payload), sent)
        error = np.linalg.norm((e - sent).astype(np.float64)) / np.linalg.norm(e.astype(np.float64))
        e = e - sent
        assert np.array_equal(residual.numpy(), e)
        assert stats.norm == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        assert stats.relative_error == pytest.approx(error, rel=1e-3, abs=1e-7)
        assert torch.equal(base, before[0])
        assert torch.equal(island, before[1])


@pytest.mark.parametrize("name", ["topk", "ternary", "int4"])
def test_all_that_moved_is_either_sent_or_held_back(name: str):
    codec, residual, payload = get_codec(name), torch.zeros(NUM_VALUES), new_payload(get_codec(name))
    moved, sent = np.zeros(NUM_VALUES), np.zeros(NUM_VALUES)
    for step in range(30):
        delta = gaussian(step)
        encode_outer_gradient_(delta, torch.zeros(NUM_VALUES), codec, payload, residual)
        moved += delta.double().numpy()
        sent += decoded(codec, payload)
    np.testing.assert_allclose(sent + residual.double().numpy(), moved, rtol=0, atol=1e-4)


def test_with_topk_small_values_arrive_only_if_they_are_remembered():
    """A gradient that stays the same, thirty-two values to every one that is sent: their sums after 100 steps."""
    codec, delta, payload = get_codec("topk"), gaussian(0), new_payload(get_codec("topk"))

    def missing(residual: torch.Tensor | None) -> float:
        sent = np.zeros(NUM_VALUES)
        for _ in range(100):
            encode_outer_gradient_(delta, torch.zeros(NUM_VALUES), codec, payload, residual)
            sent += decoded(codec, payload)
        return float(np.linalg.norm(sent / 100 - delta.double().numpy()) / delta.double().norm())

    assert missing(torch.zeros(NUM_VALUES)) < 0.2
    assert missing(None) > 0.8


def test_sparseloco_reaches_a_minimum_that_topk_alone_does_not():
    """The whole loop on |theta - m|^2 / 2 with two islands whose minima m differ: theta <- theta - alpha mean Q(e)."""
    minima = [gaussian(1), gaussian(2)]
    middle = (minima[0] + minima[1]) / 2

    def distance(feedback: bool) -> float:
        model, topk = Replica(LAYOUT, SGD(0.1), get_codec("float32")), get_codec("topk")
        residuals = [torch.zeros(NUM_VALUES) if feedback else None for _ in minima]
        for _ in range(300):
            theta, payloads = model.parameters(0), [new_payload(topk), new_payload(topk)]
            for minimum, residual, payload in zip(minima, residuals, payloads):
                island = theta + 0.3 * (minimum - theta)  # what its inner steps would do
                encode_outer_gradient_(theta, island, topk, payload, residual, 0.95)
            model.outer_step(0, payloads, [1.0, 1.0], topk)
        return float((model.parameters(0) - middle).norm() / middle.norm())

    assert distance(feedback=True) < 0.5 * distance(feedback=False)


# ---- down ----


def contributions(step: int) -> list[torch.Tensor]:
    payloads = [new_payload(get_codec("float32")) for _ in range(3)]
    for island, payload in enumerate(payloads):
        payload.view(torch.float32).copy_(gaussian(10 * step + island))
    return payloads


@pytest.mark.parametrize("name", ["int8", "int4", "ternary", "float32"])
def test_the_downlink_makes_up_for_what_it_left_out(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replica, "CHUNK_VALUES", 512)
    codec, float32 = get_codec(name), get_codec("float32")
    coordinator, follower = Replica(LAYOUT, Nesterov(), codec), Replica(LAYOUT, Nesterov(), codec)
    residual, e = torch.zeros(NUM_VALUES), np.zeros(NUM_VALUES, np.float32)
    total, sent = np.zeros(NUM_VALUES), np.zeros(NUM_VALUES)
    for step in range(6):
        payloads = contributions(step)
        g = np.median([payload.view(torch.float32).numpy() for payload in payloads], axis=0)
        combined, digest = coordinator.outer_step(0, payloads, [1.0] * 3, float32, median, residual)
        assert np.array_equal(decoded(codec, combined), quantised(codec, g + e))
        e = (g + e) - quantised(codec, g + e)
        assert np.array_equal(residual.numpy(), e)
        assert follower.apply(0, combined) == digest
        total, sent = total + g, sent + decoded(codec, combined)
    np.testing.assert_allclose(sent + e, total, rtol=0, atol=1e-5)


def test_without_a_residual_the_downlink_forgets():
    codec, float32 = get_codec("ternary"), get_codec("float32")
    forgetful, mindful = Replica(LAYOUT, SGD(), codec), Replica(LAYOUT, SGD(), codec)
    residual, exact = torch.zeros(NUM_VALUES), torch.zeros(NUM_VALUES)
    for _ in range(20):
        forgetful.outer_step(0, contributions(0), [1.0] * 3, float32)
        mindful.outer_step(0, contributions(0), [1.0] * 3, float32, residual=residual)
        exact -= torch.stack([payload.view(torch.float32) for payload in contributions(0)]).mean(0)
    off = [float((model.parameters(0) - exact).norm() / exact.norm()) for model in (forgetful, mindful)]
    assert off[1] < 0.15 < 0.5 < off[0]


def test_a_residual_of_another_length_is_refused_and_nothing_changes():
    model, residual = Replica(LAYOUT, SGD(), get_codec("int8")), torch.zeros(NUM_VALUES + 1)
    before = model.digest(0)
    with pytest.raises(ValueError, match="fragment 0 has 3001 values, its residual"):
        model.outer_step(0, contributions(0), [1.0] * 3, get_codec("float32"), residual=residual)
    assert (model.digest(0), model.versions, bool(residual.any())) == (before, [0], False)
