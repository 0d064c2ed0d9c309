"""Merging what arrives late: mixing, eager updates and whole schedules, against their definitions."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco_ray.algorithm import merging
from diloco_ray.algorithm.codecs import Codec, get_codec
from diloco_ray.algorithm.fragments import partition
from diloco_ray.algorithm.merging import EagerCorrection, merge_
from diloco_ray.algorithm.outer_gradient import encode_outer_gradient_
from diloco_ray.algorithm.outer_optimizer import SGD, HeavyBall, Nesterov, OuterOptimizer
from diloco_ray.algorithm.replica import Replica
from diloco_ray.algorithm.schedule import send_steps
from diloco_ray.errors import RunMismatchError

SHAPES = {"embed": (50, 8), "h.0.w": (8, 8), "scale": (), "head": (50, 8)}
NUM_VALUES = 3001
LAYOUT = partition({"all": (NUM_VALUES,)})
LINEAR = [SGD(0.5), HeavyBall(0.4, 0.8), Nesterov(0.7, 0.9)]


def gaussian(seed: int, num_values: int = NUM_VALUES) -> torch.Tensor:
    return torch.randn(num_values, generator=torch.Generator().manual_seed(seed))


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()
    }


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].detach().reshape(-1) for name in SHAPES])


# ---- mixing ----


@settings(deadline=None, max_examples=30)
@given(mixing=st.floats(0, 1), seed=st.integers(0, 10**6), num_fragments=st.integers(1, 4))
def test_mixing_is_streaming_dilocos_equation(mixing: float, seed: int, num_fragments: int):
    tensors, layout = model(seed), partition(SHAPES, num_fragments)
    before = {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}
    fragment = layout.fragments[-1]
    arrived = gaussian(seed + 1, fragment.num_values)
    merge_(fragment, arrived, tensors, mixing)
    merged = {slot.name: slot for slot in fragment.slots}
    for name, tensor in tensors.items():
        expected = before[name]
        if name in merged:
            expected = mixing * expected + (1 - mixing) * merged[name].of(arrived).double().numpy()
        np.testing.assert_allclose(tensor.detach().double().numpy(), expected, rtol=0, atol=2e-6)
        assert tensor.grad_fn is None


def test_nothing_kept_is_a_scatter_and_all_kept_changes_nothing():
    (fragment,) = partition(SHAPES).fragments
    arrived = gaussian(1, fragment.num_values)
    arrived[:50] = -0.0  # the sum with a zero share of positive values would be 0.0
    replaced, scattered, kept = model(), model(), model()
    merge_(fragment, arrived, replaced, 0.0)
    fragment.scatter_(arrived, scattered)
    merge_(fragment, arrived, kept, 1.0)
    for name in SHAPES:
        assert torch.equal(replaced[name].view(-1).view(torch.int32), scattered[name].view(-1).view(torch.int32))
        assert torch.equal(kept[name], model()[name])


def test_a_short_dtype_is_rounded_once_at_the_end():
    (fragment,) = partition(SHAPES).fragments
    arrived, tensors = gaussian(1, fragment.num_values), model(0, torch.bfloat16)
    before = {name: tensor.detach().float() for name, tensor in tensors.items()}
    merge_(fragment, arrived, tensors, 0.3)
    for slot in fragment.slots:
        expected = (0.3 * before[slot.name] + 0.7 * slot.of(arrived)).bfloat16()
        assert torch.equal(tensors[slot.name].detach(), expected)


@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_a_model_that_does_not_fit_is_left_as_it_was(mixing: float):
    (fragment,) = partition(SHAPES).fragments
    tensors = model() | {"head": torch.zeros(8, 50)}
    with pytest.raises(RunMismatchError, match="'head'"):
        merge_(fragment, torch.zeros(fragment.num_values), tensors, mixing)
    assert torch.equal(tensors["embed"], model()["embed"])


# ---- eager ----


def in_numpy(optimizer: OuterOptimizer, theta: np.ndarray, b: np.ndarray, g: np.ndarray) -> None:
    """One outer step in float64, in place."""
    match optimizer:
        case SGD(eta):
            theta -= eta * g
        case HeavyBall(eta, mu):
            b[:] = mu * b + g
            theta -= eta * b
        case Nesterov(eta, mu):
            b[:] = mu * b + g
            theta -= eta * (g + mu * b)
        case _:
            raise AssertionError(optimizer)


def sent(round: int, island: int, codec: Codec) -> tuple[torch.Tensor, np.ndarray]:
    """A payload, and what it decodes to in float64."""
    payload, out = torch.zeros(codec.num_bytes(NUM_VALUES), dtype=torch.uint8), torch.empty(NUM_VALUES)
    encode_outer_gradient_(gaussian(100 * round + island), torch.zeros(NUM_VALUES), codec, payload)
    codec.decode_(payload, 0, NUM_VALUES, out)
    return payload, out.double().numpy()


@pytest.mark.parametrize("optimizer", LINEAR, ids=str)
@pytest.mark.parametrize("uplink", ["int4", "float32"])
@pytest.mark.parametrize("num_islands", [(4,) * 8, (1, 2, 5, 3, 3, 1, 4, 2)], ids=["constant", "changing"])
def test_eager_updates_are_those_of_an_own_replica_for_each_island(
    optimizer: OuterOptimizer, uplink: str, num_islands: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    """Literally: island m has a replica of its own and steps it along mean(t-1) + d(t)/M_t - d(t-1)/M_{t-1}."""
    monkeypatch.setattr(merging, "CHUNK_VALUES", 512)
    codec, float32, start = get_codec(uplink), get_codec("float32"), gaussian(9)
    shared = Replica(LAYOUT, optimizer, float32)
    shared.load_from_({"all": start})
    correction = EagerCorrection(NUM_VALUES, optimizer, codec)
    own, b = start.double().numpy().copy(), np.zeros(NUM_VALUES)
    mean, former = np.zeros(NUM_VALUES), np.zeros(NUM_VALUES)
    payloads: list[torch.Tensor] = []
    for round, count in enumerate(num_islands):
        if round:
            shared.outer_step(0, payloads, [1.0] * len(payloads), codec)
        contributions = [sent(round, island, codec) for island in range(count)]
        payloads = [payload for payload, _ in contributions]
        correction.step_(payloads[0], count)
        own_part = contributions[0][1] / count
        in_numpy(optimizer, own, b, mean + own_part - former)
        mean, former = np.mean([d for _, d in contributions], axis=0), own_part
        values = shared.parameters(0).clone()
        correction.add_to_(values)
        np.testing.assert_allclose(values.double().numpy(), own, rtol=0, atol=3e-5)


@pytest.mark.parametrize("optimizer", LINEAR, ids=str)
def test_a_single_eager_island_is_not_delayed(optimizer: OuterOptimizer):
    """M = 1: mean(t-1) is d(t-1), so g~(t) = d(t)."""
    codec = get_codec("int8")
    shared, undelayed = Replica(LAYOUT, optimizer, codec), Replica(LAYOUT, optimizer, codec)
    correction = EagerCorrection(NUM_VALUES, optimizer, codec)
    payloads = [sent(round, 0, codec)[0] for round in range(6)]
    for round, payload in enumerate(payloads):
        if round:
            shared.apply(0, payloads[round - 1])
        undelayed.apply(0, payload)
        correction.step_(payload, 1)
        values = shared.parameters(0).clone()
        correction.add_to_(values)
        torch.testing.assert_close(values, undelayed.parameters(0), rtol=0, atol=3e-5)


def test_without_momentum_the_offset_is_the_last_own_part_alone():
    correction, codec = EagerCorrection(NUM_VALUES, SGD(0.5), get_codec("int8")), get_codec("int8")
    for round in range(10):
        payload, d = sent(round, 0, codec)
        correction.step_(payload, 3)
        offset = torch.zeros(NUM_VALUES)
        correction.add_to_(offset)
        np.testing.assert_allclose(offset.double().numpy(), -0.5 * d / 3, rtol=0, atol=1e-6)


# ---- whole schedules, composed of the parts ----


class Literal:
    """Streaming DiLoCo, Algorithm 2, in float64: islands descend |theta - minimum|^2 / 2, each to one of its own."""

    def __init__(self, minima: list[np.ndarray], pieces: list[slice], optimizer: OuterOptimizer, start: np.ndarray):
        self.minima, self.pieces, self.optimizer = minima, pieces, optimizer
        self.shared, self.b = start.copy(), np.zeros(start.size)
        self.islands = [start.copy() for _ in minima]
        self.under_way: dict[int, list[tuple[int, np.ndarray]]] = {}

    def step(self, t: int, offsets: tuple[int, ...], num_steps: int, overlap: int, mixing: float) -> None:
        for island, minimum in zip(self.islands, self.minima):
            island -= 0.1 * (island - minimum)
        for p, piece in enumerate(self.pieces):
            if (t - offsets[p]) % num_steps == 0:
                deltas = [self.shared[piece] - island[piece] for island in self.islands]
                self.under_way.setdefault(t + overlap, []).append((p, np.mean(deltas, axis=0)))
        for p, g in self.under_way.pop(t, []):
            piece = self.pieces[p]
            in_numpy(self.optimizer, self.shared[piece], self.b[piece], g)
            for island in self.islands:
                island[piece] = mixing * island[piece] + (1 - mixing) * self.shared[piece]


@pytest.mark.parametrize("optimizer", [SGD(1.0), Nesterov(0.4, 0.9)], ids=str)
@pytest.mark.parametrize(
    ("num_fragments", "num_steps", "overlap", "mixing"),
    [(1, 5, 0, 0.0), (1, 5, 5, 0.0), (3, 7, 0, 0.0), (3, 7, 2, 0.5), (4, 6, 5, 0.25)],
    ids=["diloco", "delayed", "streaming", "streaming overlapped", "streaming overlapped longer"],
)
def test_the_parts_make_up_streaming_diloco(
    optimizer: OuterOptimizer, num_fragments: int, num_steps: int, overlap: int, mixing: float
):
    float32, layout = get_codec("float32"), partition(SHAPES, num_fragments)
    offsets = send_steps(num_steps, num_fragments)
    sizes = np.cumsum([0, *(fragment.num_values for fragment in layout.fragments)])
    pieces = [slice(first, stop) for first, stop in pairwise(sizes)]
    shared, islands, minima = Replica(layout, optimizer, float32), [model(), model()], [model(1), model(2)]
    shared.load_from_(model())
    literal = Literal(
        [flat(minimum).double().numpy() for minimum in minima], pieces, optimizer, flat(model()).double().numpy()
    )
    under_way: dict[int, list[tuple[int, list[torch.Tensor]]]] = {}
    for t in range(1, 5 * num_steps + 1):
        for island, minimum in zip(islands, minima):
            for name in SHAPES:
                island[name].data -= 0.1 * (island[name] - minimum[name]).detach()
        for fragment, offset in zip(layout.fragments, offsets):
            if (t - offset) % num_steps == 0:
                payloads: list[torch.Tensor] = []
                for island in islands:
                    values = torch.empty(fragment.num_values)
                    fragment.gather_(island, values)
                    payloads.append(torch.empty(4 * fragment.num_values, dtype=torch.uint8))
                    encode_outer_gradient_(shared.parameters(fragment.index), values, float32, payloads[-1])
                under_way.setdefault(t + overlap, []).append((fragment.index, payloads))
        for p, payloads in under_way.pop(t, []):
            shared.outer_step(p, payloads, [1.0, 1.0], float32)
            for island in islands:
                merge_(layout.fragments[p], shared.parameters(p), island, mixing)
        literal.step(t, offsets, num_steps, overlap, mixing)
        for ours, theirs in zip(islands, literal.islands):
            np.testing.assert_allclose(flat(ours).double().numpy(), theirs, rtol=0, atol=1e-4)
    found = torch.cat([shared.parameters(p) for p in range(num_fragments)])
    np.testing.assert_allclose(found.double().numpy(), literal.shared, rtol=0, atol=1e-4)
    assert shared.versions == [5 - (offset + overlap > num_steps) for offset in offsets]
