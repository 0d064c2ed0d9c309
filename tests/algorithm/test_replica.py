"""Replicas: whoever replays the same bytes holds the same bits."""

import math
import os
import subprocess
import sys

import pytest
import torch

from diloco_ray.algorithm import replica as replica_module
from diloco_ray.algorithm.codecs import CODEC_NAMES, get_codec
from diloco_ray.algorithm.combine import COMBINES, Combine, mean
from diloco_ray.algorithm.fragments import Layout, partition
from diloco_ray.algorithm.outer_gradient import encode_outer_gradient_
from diloco_ray.algorithm.outer_optimizer import SGD, Adam, DelayedNesterov, HeavyBall, Nesterov, OuterOptimizer
from diloco_ray.algorithm.replica import Replica, StateDigest

LAYOUT = partition({"embed": (301, 16), "body": (80, 80), "head": (16, 301), "bias": (7,)}, 2)
OPTIMIZERS = [SGD(), Nesterov(), HeavyBall(), Adam(0.1), DelayedNesterov(0.7, 0.9, 2)]


def pattern(num_values: int, salt: int) -> torch.Tensor:
    """Values in about [-1, 1) from integer arithmetic only: the same bits on every machine."""
    return (torch.arange(num_values) * 7919 + salt * 104729).remainder(65521).sub(32760).float() * 2.0**-15


def initialised(optimizer: OuterOptimizer, codec: str, layout: Layout = LAYOUT) -> Replica:
    replica = Replica(layout, optimizer, get_codec(codec))
    shapes = {slot.name: slot.shape for fragment in layout.fragments for slot in fragment.slots}
    replica.load_from_({name: pattern(math.prod(shape), 1).view(shape) for name, shape in shapes.items()})
    return replica


def contributions(replica: Replica, fragment: int, codec: str, num_islands: int) -> list[torch.Tensor]:
    base = replica.parameters(fragment)
    payloads: list[torch.Tensor] = []
    for island in range(num_islands):
        payloads.append(torch.empty(get_codec(codec).num_bytes(base.numel()), dtype=torch.uint8))
        moved = base - pattern(base.numel(), 3 + island + replica.versions[fragment]) * 2.0**-7
        encode_outer_gradient_(base, moved, get_codec(codec), payloads[-1])
    return payloads


def train(
    replica: Replica, uplink: str = "int8", num_rounds: int = 3, combine: Combine = mean
) -> list[tuple[int, torch.Tensor, StateDigest]]:
    """A small log: (fragment, payload, digest) of every outer step."""
    log: list[tuple[int, torch.Tensor, StateDigest]] = []
    for _ in range(num_rounds):
        for fragment in range(len(replica.layout.fragments)):
            payloads = contributions(replica, fragment, uplink, 3)
            log.append((fragment, *replica.outer_step(fragment, payloads, [1, 2, 3], get_codec(uplink), combine)))
    return log


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("downlink", CODEC_NAMES)
def test_applying_the_payload_of_an_outer_step_gives_the_same_bits(optimizer: OuterOptimizer, downlink: str):
    coordinator, island = initialised(optimizer, downlink), initialised(optimizer, downlink)
    for fragment, payload, digest in train(coordinator):
        assert island.apply(fragment, payload) == digest
        assert island.digest(fragment) == digest
    assert island.versions == coordinator.versions == [3, 3]
    for fragment in range(2):
        assert torch.equal(island.parameters(fragment), coordinator.parameters(fragment))
        for ours, theirs in zip(island.buffers(fragment), coordinator.buffers(fragment)):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("combine", COMBINES)
def test_every_combine_is_replayed_from_its_payload_alone(combine: str):
    coordinator, island = initialised(Nesterov(), "int8"), initialised(Nesterov(), "int8")
    log = train(coordinator, combine=COMBINES[combine])
    assert [island.apply(fragment, payload) for fragment, payload, _ in log] == [digest for _, _, digest in log]
    if combine != "mean":
        assert log[-1][2] != train(initialised(Nesterov(), "int8"))[-1][2]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_the_size_of_chunks_changes_no_bit(optimizer: OuterOptimizer, codec: str, monkeypatch: pytest.MonkeyPatch):
    whole = train(initialised(optimizer, codec), codec, num_rounds=2)
    for chunk in (256, 1024):
        monkeypatch.setattr(replica_module, "CHUNK_VALUES", chunk)
        for ours, theirs in zip(train(initialised(optimizer, codec), codec, num_rounds=2), whole):
            assert torch.equal(ours[1], theirs[1])
            assert ours[2] == theirs[2]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_the_number_of_threads_changes_no_bit(optimizer: OuterOptimizer, codec: str):
    layout = partition({"a": (150_001,)})  # above torch's threshold for working in parallel
    digests: list[StateDigest] = []
    default = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            digests.append(train(initialised(optimizer, codec, layout), codec, num_rounds=2)[-1][2])
    finally:
        torch.set_num_threads(default)
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize(
    ("codec", "optimizer", "parameters", "buffers"),
    [
        ("float32", Nesterov(0.7, 0.9), "daa75c651ccb07f09ed876268d6a0e9f", "95d70193ab104d85c2ffdd9668d790e9"),
        ("bfloat16", SGD(0.3), "429fe07d010cbdce4da025583c4e5aeb", "99aa06d3014798d86001c324468d497f"),
        ("float16", HeavyBall(0.7, 0.9), "c11b37fa549d26ef4d03cb0c9ea68013", "a8aa1c58509828484829945fcb1c112c"),
        ("int8", Nesterov(0.7, 0.9), "4aab21c498561e1585f634383ab4cf49", "cd973cd05c6e8a2233b60496946177b8"),
        ("int4", Nesterov(0.7, 0.9), "c10114d1f955259db8b817f7c2794c96", "840acd218daac357f7d18ced620b1c12"),
        ("int8", DelayedNesterov(0.7, 0.9, 3), "cf7c988c4224e0a49bd93e53fdcd51e7", "aa364688a2c7d3b10472e2509d452abe"),
        ("int4", Adam(0.1), "7e779d62d6d67cfa4e462b1afe1ad525", "d4d4a4ed8ae4f660ff4556a2196e9117"),
        ("e3m0", Nesterov(0.7, 0.9), "644b062ab458df9b90477b58938d70cc", "50d94baea57d75276a10e176deacb0b5"),
        ("topk", Nesterov(0.7, 0.9), "f29f9aea6e4f8cc9896ddd4b9b0e675e", "adb2a6d89747584fa61fc0576383a059"),
        ("ternary", Nesterov(0.7, 0.9), "f7329e4b841dad18a225008b885c1fa0", "322411eb3ea9dbeea583e8e1b8796941"),
    ],
)
def test_every_machine_arrives_at_these_digests(codec: str, optimizer: OuterOptimizer, parameters: str, buffers: str):
    assert train(initialised(optimizer, codec), codec)[-1][2] == StateDigest(parameters, buffers)


@pytest.mark.parametrize("instructions", ["default", "avx2"])
def test_every_instruction_set_arrives_at_these_digests(instructions: str):
    this_file_again = [
        sys.executable,
        "-m",
        "pytest",
        __file__,
        "-k",
        "every_machine_arrives",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        this_file_again, env=os.environ | {"ATEN_CPU_CAPABILITY": instructions}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_an_outer_step_is_the_equation():
    replica = initialised(Nesterov(0.7, 0.9), "float32")
    theta, b = replica.parameters(0).double(), torch.zeros(replica.parameters(0).numel(), dtype=torch.float64)
    for _ in range(3):
        payloads = contributions(replica, 0, "float32", 2)
        g = sum(w * p.view(torch.float32).double() for w, p in zip((0.25, 0.75), payloads))
        replica.outer_step(0, payloads, [1, 3], get_codec("float32"))
        b = 0.9 * b + g
        theta = theta - 0.7 * (g + 0.9 * b)
    torch.testing.assert_close(replica.parameters(0).double(), theta, rtol=0, atol=1e-6)
    torch.testing.assert_close(replica.buffers(0)[0].double(), b, rtol=0, atol=1e-6)


def test_a_model_goes_in_and_comes_out_unchanged():
    model = {slot.name: torch.rand(slot.shape) for fragment in LAYOUT.fragments for slot in fragment.slots}
    replica = Replica(LAYOUT, Nesterov(), get_codec("int8"))
    train(replica)
    replica.load_from_(model)
    copy = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    replica.write_to_(copy)
    assert all(torch.equal(copy[name], tensor) for name, tensor in model.items())
    assert replica.versions == [0, 0]
    assert not replica.buffers(0)[0].any()


def test_a_loaded_state_continues_like_the_one_it_was_taken_from():
    source, joiner = initialised(Adam(0.1), "int4"), Replica(LAYOUT, Adam(0.1), get_codec("int4"))
    train(source, "int4")
    for fragment in range(2):
        joiner.load_(fragment, source.versions[fragment], source.parameters(fragment), source.buffers(fragment))
    assert joiner.parameters(0).data_ptr() != source.parameters(0).data_ptr()
    for fragment, payload, digest in train(source, "int4"):
        assert joiner.apply(fragment, payload) == digest


def test_a_digest_sees_one_bit_of_parameters_and_of_every_buffer():
    replica = initialised(Adam(0.1), "float32")
    train(replica, num_rounds=1)
    before = replica.digest(1)
    for changed, tensor in (("parameters", replica.parameters(1)), *(("optimizer", b) for b in replica.buffers(1))):
        tensor.view(torch.int32)[-1] ^= 1
        after = replica.digest(1)
        assert (after.parameters == before.parameters) == (changed != "parameters")
        assert (after.optimizer == before.optimizer) == (changed != "optimizer")
        tensor.view(torch.int32)[-1] ^= 1
    assert replica.digest(1) == before


def test_what_does_not_fit_is_refused_and_changes_nothing():
    replica = initialised(Nesterov(), "int8")
    train(replica, num_rounds=1)
    before = [replica.digest(fragment) for fragment in range(2)]
    payload = contributions(replica, 0, "int8", 1)[0]
    int8 = get_codec("int8")
    with pytest.raises(ValueError, match="0 contributions"):
        replica.outer_step(0, [], [], int8)
    with pytest.raises(ValueError, match="1 contributions with weights"):
        replica.outer_step(0, [payload], [0.0], int8)
    with pytest.raises(ValueError, match=r"a int8 payload is uint8 of \d+ bytes"):
        replica.outer_step(0, [payload, payload[:-1]], [1.0, 1.0], int8)
    with pytest.raises(ValueError, match="payload"):
        replica.apply(0, payload[1:])
    with pytest.raises(ValueError, match="payload"):
        replica.apply(0, payload.view(torch.int8))
    with pytest.raises(ValueError, match="fragment 0 has"):
        replica.load_(0, 1, replica.parameters(0)[1:], replica.buffers(0))
    with pytest.raises(ValueError, match="fragment 0 has"):
        replica.load_(0, 1, replica.parameters(0), ())
    assert [replica.digest(fragment) for fragment in range(2)] == before
    assert replica.versions == [1, 1]
