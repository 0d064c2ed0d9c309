"""The mathematics around a replica: the outer gradient, the outer optimizers and their settings."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from diloco_ray.algorithm import outer_gradient
from diloco_ray.algorithm.codecs import CODEC_NAMES, get_codec
from diloco_ray.algorithm.combine import COMBINES
from diloco_ray.algorithm.outer_gradient import encode_outer_gradient_, inspect_payload, pairwise_cosines
from diloco_ray.algorithm.outer_optimizer import SGD, Adam, DelayedNesterov, HeavyBall, Nesterov, OuterOptimizer
from diloco_ray.algorithm.settings import OuterSettings


def gaussian(num_values: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(num_values, generator=torch.Generator().manual_seed(seed)) * scale


def encoded(values: torch.Tensor, name: str = "float32") -> torch.Tensor:
    payload = torch.zeros(get_codec(name).num_bytes(values.numel()), dtype=torch.uint8)
    get_codec(name).encode_(values, payload, 0, values.numel())
    return payload


class TestOuterGradient:
    def test_it_is_base_minus_island_with_the_norms_of_what_was_sent(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(outer_gradient, "CHUNK_VALUES", 512)
        base, island = gaussian(3001, 0), gaussian(3001, 1)
        for name in CODEC_NAMES:
            payload = torch.zeros(get_codec(name).num_bytes(3001), dtype=torch.uint8)
            stats = encode_outer_gradient_(base, island, get_codec(name), payload)
            delta = base.double().numpy() - island.double().numpy()
            assert torch.equal(payload, encoded(base - island, name))
            decoded = torch.empty(3001)
            get_codec(name).decode_(payload, 0, 3001, decoded)
            error = np.linalg.norm(decoded.double().numpy() - delta) / np.linalg.norm(delta)
            assert stats.norm == pytest.approx(np.linalg.norm(delta), rel=1e-5)
            assert stats.relative_error == pytest.approx(error, rel=1e-3, abs=1e-7)
            assert inspect_payload(payload, 3001, get_codec(name)) == pytest.approx(float(decoded.norm()), rel=1e-5)

    def test_an_island_that_did_not_move_sends_zero(self):
        payload = torch.zeros(get_codec("int8").num_bytes(300), dtype=torch.uint8)
        stats = encode_outer_gradient_(gaussian(300, 0), gaussian(300, 0), get_codec("int8"), payload)
        assert (stats.norm, stats.relative_error) == (0.0, 0.0)
        assert not payload.any()

    @pytest.mark.parametrize("name", CODEC_NAMES)
    @pytest.mark.parametrize("bad", [torch.inf, torch.nan])
    def test_inspection_sees_one_bad_value(self, name: str, bad: float):
        values = gaussian(1000, 0)
        values[777] = bad
        assert not math.isfinite(inspect_payload(encoded(values, name), 1000, get_codec(name)))

    @pytest.mark.parametrize("name", ["float32", "int8", "topk"])
    def test_cosines_of_all_pairs_in_island_order(self, name: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(outer_gradient, "CHUNK_VALUES", 2048)
        codec, size = get_codec(name), 10_001  # several pieces of 16 blocks, the last one cut short
        shared = gaussian(size, 99)
        payloads = [encoded(gaussian(size, m, 1 + m) + m * shared, name) for m in range(4)]
        v = np.stack([np.empty(size, np.float32) for _ in payloads])
        for payload, row in zip(payloads, v):
            codec.decode_(payload, 0, size, torch.from_numpy(row))
        v = v.astype(np.float64) / np.linalg.norm(v.astype(np.float64), axis=1)[:, None]
        pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
        assert pairwise_cosines(payloads, codec, size) == pytest.approx([v[i] @ v[j] for i, j in pairs])

    def test_cosines_of_what_has_no_direction_or_no_partner(self):
        zero, one = encoded(torch.zeros(300)), encoded(gaussian(300, 0))
        assert pairwise_cosines([one, zero, one], get_codec("float32"), 300) == pytest.approx([0.0, 1.0, 0.0])
        assert pairwise_cosines([one], get_codec("float32"), 300) == []
        assert pairwise_cosines([], get_codec("float32"), 300) == []


def run(optimizer: OuterOptimizer, theta: torch.Tensor, gradients: list[torch.Tensor], chunk: int) -> torch.Tensor:
    theta = theta.clone()
    buffers = tuple(torch.zeros_like(theta) for _ in optimizer.buffer_names)
    for step, g in enumerate(gradients, start=1):
        before = g.clone()
        for start in range(0, theta.numel(), chunk):
            here = slice(start, start + chunk)
            scratch = torch.full_like(theta[here], torch.nan)
            optimizer.step_(theta[here], g[here], tuple(b[here] for b in buffers), step, scratch)
        assert torch.equal(g, before)
    return theta


def run_torch(kind: type[torch.optim.Optimizer], theta: torch.Tensor, gradients: list[torch.Tensor], **options: object):
    parameter = torch.nn.Parameter(theta.double())
    oracle = kind([parameter], **options)
    for g in gradients:
        parameter.grad = g.double()
        oracle.step()
    return parameter.detach()


THETA = gaussian(1000, 0)
GRADIENTS = [gaussian(1000, seed, 0.1) for seed in range(1, 21)]


class TestOuterOptimizer:
    @pytest.mark.parametrize(
        ("ours", "kind", "options"),
        [
            (SGD(0.3), torch.optim.SGD, {"lr": 0.3}),
            (Nesterov(0.7, 0.9), torch.optim.SGD, {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
            (HeavyBall(0.4, 0.8), torch.optim.SGD, {"lr": 0.4, "momentum": 0.8}),
            (Adam(0.1, 0.9, 0.95, 0.1), torch.optim.Adam, {"lr": 0.1, "betas": (0.9, 0.95), "eps": 0.1}),
            (Adam(0.1, 0.0, 0.999, 1e-8), torch.optim.Adam, {"lr": 0.1, "betas": (0.0, 0.999), "eps": 1e-8}),
        ],
        ids=str,
    )
    def test_it_follows_torch_optim(self, ours: OuterOptimizer, kind: type, options: dict[str, float]):
        expected = run_torch(kind, THETA, GRADIENTS, **options)
        torch.testing.assert_close(run(ours, THETA, GRADIENTS, 1000).double(), expected, rtol=0, atol=2e-5)

    @settings(deadline=None, max_examples=25)
    @given(eta=st.floats(0.01, 1), mu=st.floats(0, 0.95), num=st.integers(1, 5), seed=st.integers(0, 10**6))
    @pytest.mark.parametrize("name", get_args(OuterSettings.model_fields["optimizer"].annotation))
    def test_it_is_its_equation(self, name: Any, eta: float, mu: float, num: int, seed: int):
        """Each one written out once more, in NumPy with float64."""
        outer = OuterSettings(optimizer=name, learning_rate=eta, momentum=mu, arrivals=num).build()
        gradients = [gaussian(300, seed + step, 0.1) for step in range(12)]
        theta = np.zeros(300)
        b, v, acc = np.zeros((3, 300))
        for t, g in enumerate((g.double().numpy() for g in gradients), start=1):
            if name == "sgd":
                theta = theta - eta * g
            elif name == "heavy_ball":
                b = mu * b + g
                theta = theta - eta * b
            elif name == "nesterov":
                b = mu * b + g
                theta = theta - eta * (g + mu * b)
            elif name == "adam":
                b, v = mu * b + (1 - mu) * g, 0.95 * v + 0.05 * g**2
                theta = theta - eta * (b / (1 - mu**t)) / (np.sqrt(v / (1 - 0.95**t)) + 0.1)
            elif t % num:
                acc, theta = acc + g, theta - eta * g / num
            else:
                b, acc = mu * b + (acc + g) / num, np.zeros(300)
                theta = theta - eta * (mu * b + g / num)
        found = run(outer, torch.zeros(300), gradients, 128)
        np.testing.assert_allclose(found.double().numpy(), theta, rtol=0, atol=2e-5)

    def test_nesterov_by_hand(self):
        g, theta = 1.0, torch.zeros(1)
        b = torch.zeros(1)
        Nesterov(0.5, 0.5).step_(theta, torch.tensor([g]), (b,), 1, torch.empty(1))
        assert (b.item(), theta.item()) == (1.0, -0.5 * (1.0 + 0.5 * 1.0))
        Nesterov(0.5, 0.5).step_(theta, torch.tensor([g]), (b,), 2, torch.empty(1))
        assert (b.item(), theta.item()) == (1.5, -0.75 - 0.5 * (1.0 + 0.5 * 1.5))

    def test_delayed_nesterov_by_hand(self):
        theta, buffers = torch.zeros(1), (torch.zeros(1), torch.zeros(1))
        found: list[tuple[float, float, float]] = []
        for step, g in enumerate((4.0, 2.0, -2.0, 6.0), start=1):
            DelayedNesterov(0.5, 0.5, 2).step_(theta, torch.tensor([g]), buffers, step, torch.empty(1))
            found.append((theta.item(), buffers[0].item(), buffers[1].item()))
        # theta falls by eps g / N = g / 4; at steps 2 and 4 m becomes 0 / 2 + 6 / 2 = 3, then 3 / 2 + 4 / 2 = 3.5,
        # and theta falls by eps beta m = m / 4 more
        assert found == [(-1.0, 0.0, 4.0), (-1.5 - 0.75, 3.0, 0.0), (-1.75, 3.0, -2.0), (-3.25 - 0.875, 3.5, 0.0)]

    @pytest.mark.parametrize("arrivals", [1, 2, 5])
    def test_delayed_nesterov_adds_up_to_nesterov_on_the_mean_of_its_arrivals(self, arrivals: int):
        means = [torch.stack(GRADIENTS[i : i + arrivals]).mean(0) for i in range(0, 20, arrivals)]
        delayed = run(DelayedNesterov(0.4, 0.8, arrivals), THETA, GRADIENTS, 1000)
        torch.testing.assert_close(delayed, run(Nesterov(0.4, 0.8), THETA, means, 1000), rtol=0, atol=2e-5)

    def test_sgd_at_one_is_federated_averaging(self):
        islands = [gaussian(1000, seed) for seed in (7, 8, 9)]
        mean = sum(THETA - island for island in islands) / 3
        theta = run(SGD(1.0), THETA, [mean], 1000)
        torch.testing.assert_close(theta, sum(islands[1:], islands[0]) / 3, rtol=0, atol=2e-6)

    @pytest.mark.parametrize(
        "optimizer", [SGD(), Nesterov(), HeavyBall(), Adam(0.1), DelayedNesterov(0.7, 0.9, 3)], ids=str
    )
    def test_the_length_of_chunks_changes_no_bit(self, optimizer: OuterOptimizer):
        whole = run(optimizer, THETA, GRADIENTS, 1000)
        for chunk in (7, 256):
            assert torch.equal(run(optimizer, THETA, GRADIENTS, chunk), whole)


class TestSettings:
    def test_the_default_is_the_papers_nesterov(self):
        assert OuterSettings().build() == Nesterov(learning_rate=0.7, momentum=0.9)

    def test_every_optimizer_is_built_by_name_with_its_numbers(self):
        built = {
            name: OuterSettings(optimizer=name, learning_rate=0.3, momentum=0.8, epsilon=0.2, arrivals=5).build()
            for name in ("sgd", "heavy_ball", "nesterov", "adam", "delayed_nesterov")
        }
        assert list(built.values()) == [
            SGD(0.3),
            HeavyBall(0.3, 0.8),
            Nesterov(0.3, 0.8),
            Adam(0.3, 0.8, 0.95, 0.2),
            DelayedNesterov(0.3, 0.8, 5),
        ]
        assert {name: optimizer.name for name, optimizer in built.items()} == {name: name for name in built}

    @pytest.mark.parametrize(
        ("num_islands", "rate"), [(1, 0.4), (2, 0.6), (3, 0.6), (4, 0.6), (5, 0.8), (8, 0.8), (64, 0.8)]
    )
    def test_the_rate_by_islands_is_the_papers(self, num_islands: int, rate: float):
        by_islands = OuterSettings(learning_rate="by_islands", optimizer="delayed_nesterov")
        resolved = by_islands.for_islands(num_islands, one_by_one=True)
        assert resolved.build() == DelayedNesterov(rate, 0.9, num_islands)
        assert resolved.for_islands(3, one_by_one=True) == resolved

    def test_where_each_outer_step_is_the_islands_mean_already_it_is_not_divided_by_them_again(self):
        settings = OuterSettings(learning_rate=0.4, optimizer="delayed_nesterov")
        assert settings.for_islands(8, one_by_one=False).build() == DelayedNesterov(0.4, 0.9, 1)

    def test_numbers_that_were_given_do_not_depend_on_the_islands(self):
        given = OuterSettings(learning_rate=0.3, optimizer="delayed_nesterov", arrivals=7)
        assert given.for_islands(2, one_by_one=True).build() == given.build() == DelayedNesterov(0.3, 0.9, 7)

    @pytest.mark.parametrize("fields", [{"learning_rate": "by_islands"}, {"optimizer": "delayed_nesterov"}], ids=str)
    def test_what_is_not_a_number_yet_builds_nothing(self, fields: dict[str, Any]):
        with pytest.raises(ValueError, match="resolve it with for_islands"):
            OuterSettings(**fields).build()

    def test_a_rate_may_be_written_as_yaml_reads_it(self):
        assert OuterSettings.model_validate({"learning_rate": "1e-3"}).learning_rate == 1e-3
        assert OuterSettings.model_validate({"learning_rate": 1}).build() == Nesterov(1.0, 0.9)

    @pytest.mark.parametrize("name", ["sgd", "heavy_ball", "nesterov", "adam", "delayed_nesterov"])
    def test_an_optimizer_is_linear_if_steps_along_two_gradients_add_up(self, name: Any):
        outer = OuterSettings(optimizer=name, learning_rate=0.5, arrivals=3)
        apart = [run(outer.build(), torch.zeros(1000), GRADIENTS[i : i + 6], 1000) for i in (0, 6)]
        sums = [g + h for g, h in zip(GRADIENTS[:6], GRADIENTS[6:12])]
        adds_up = torch.allclose(run(outer.build(), torch.zeros(1000), sums, 1000), apart[0] + apart[1], atol=1e-5)
        assert adds_up or not outer.is_linear
        assert outer.is_linear == (adds_up and name != "delayed_nesterov")  # its steps are not all alike

    def test_every_combine_is_chosen_by_its_name(self):
        assert OuterSettings().combine_function is COMBINES["mean"]
        for name, combine in COMBINES.items():
            assert OuterSettings.model_validate({"combine": name}).combine_function is combine

    @pytest.mark.parametrize(
        "wrong",
        [
            {"learning_rate": 0},
            {"learning_rate": math.inf},
            {"learning_rate": math.nan},
            {"learning_rate": "by_island"},
            {"learning_rate": None},
            {"arrivals": 0},
            {"momentum": 1.0},
            {"momentum": -0.1},
            {"epsilon": 0},
            {"optimizer": "adamw"},
            {"combine": "sum"},
            {"lr": 0.7},
        ],
        ids=str,
    )
    def test_what_cannot_be_meant_is_refused(self, wrong: dict[str, object]):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            OuterSettings.model_validate(wrong)
