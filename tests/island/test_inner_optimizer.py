"""The inner optimizer: its learning rate step by step, and its state there and back."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diloco_ray.errors import ConfigError
from diloco_ray.island.inner_optimizer import (
    InnerOptimizer,
    build_inner_optimizer,
    is_hidden_matrix,
    learning_rate_at,
    load_state_tensors_,
    longest_move,
    state_tensors,
)
from diloco_ray.island.settings import InnerSettings


def settings(**fields: Any) -> InnerSettings:
    return InnerSettings(**{"learning_rate": 1.0, **fields})


def rates(inner: InnerSettings, steps: range, num_steps: int) -> list[float]:
    return [learning_rate_at(inner, step, num_steps) for step in steps]


def test_warmup_is_linear_and_its_last_step_has_the_full_rate() -> None:
    inner = settings(warmup_steps=4, schedule="constant")
    assert rates(inner, range(6), 100) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_the_end_of_the_warmup_to_5_percent_at_the_last_step() -> None:
    inner = settings(warmup_steps=10, schedule="cosine")
    assert learning_rate_at(inner, 9, 110) == 1.0
    assert learning_rate_at(inner, 10, 110) == 1.0
    assert learning_rate_at(inner, 60, 110) == pytest.approx(0.05 + 0.95 / 2)
    assert learning_rate_at(inner, 110, 110) == pytest.approx(0.05)
    quarter = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi / 4))
    assert learning_rate_at(inner, 35, 110) == pytest.approx(quarter)


def test_cosine_never_rises_and_stays_at_its_end_past_the_horizon() -> None:
    inner = settings(final_learning_rate_ratio=0.1)
    found = rates(inner, range(60), 40)
    assert found == sorted(found, reverse=True)
    assert found[40:] == [pytest.approx(0.1)] * 20


def test_a_constant_rate_is_constant() -> None:
    assert rates(settings(schedule="constant"), range(5), 5) == [1.0] * 5


def test_a_warmup_as_long_as_the_run_is_a_ramp_to_its_end() -> None:
    assert rates(settings(warmup_steps=4), range(4), 4) == [0.25, 0.5, 0.75, 1.0]


def test_a_joiner_ramps_over_its_own_steps_whatever_the_global_step() -> None:
    inner = settings(schedule="constant", joiner_ramp_steps=4)
    found = [learning_rate_at(inner, 50 + own, 100, own) for own in range(6)]
    assert found == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_joiners_ramp_multiplies_the_rate_that_all_have() -> None:
    inner = settings(joiner_ramp_steps=2)
    assert learning_rate_at(inner, 50, 100, 0) == pytest.approx(0.5 * learning_rate_at(inner, 50, 100))


def test_without_a_ramp_a_joiner_has_everybodys_rate() -> None:
    assert learning_rate_at(settings(joiner_ramp_steps=0, schedule="constant"), 50, 100, 0) == 1.0


# ---- how far steps can go ----


@pytest.mark.parametrize("fields", [{}, {"betas": (0.9, 0.999)}, {"optimizer": "muon"}])
@pytest.mark.parametrize("growth", [0.2, 1.0, 5.0])
def test_no_gradients_move_parameters_further_than_the_longest_move(fields: dict[str, Any], growth: float) -> None:
    """Of one sign, so that every step goes on from the one before, and growing as fast as is worst for AdamW."""
    inner = settings(learning_rate=0.01, steps_per_round=30, weight_decay=0.0, **fields)
    moved = parameters({"layers.0.weight": (16, 16)})
    before = moved["layers.0.weight"].detach().clone()
    optimizer = build_inner_optimizer(inner, moved)
    for step in range(inner.steps_per_round):
        moved["layers.0.weight"].grad = torch.full((16, 16), growth**step)
        optimizer.step()
    length = (moved["layers.0.weight"].detach() - before).norm().item()
    assert longest_move(inner, 256) / 2000 < length < longest_move(inner, 256) / 9.9


@pytest.mark.parametrize("fields", [{"optimizer": "sgd"}, {"betas": (0.99, 0.9)}])
def test_where_steps_may_have_any_length_no_longest_move_is_known(fields: dict[str, Any]) -> None:
    assert longest_move(settings(**fields), 256) == 0.0


# ---- state ----


SHAPES = {"layers.0.weight": (3, 4), "layers.0.bias": (5,)}


def parameters(shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def take_steps(optimizer: InnerOptimizer, first: int, stop: int) -> None:
    """With gradients that depend on the step and on the parameter's shape."""
    for step in range(first, stop):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                generator = torch.Generator().manual_seed(100 * step + sum(parameter.shape))
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_an_optimizer_with_loaded_state_goes_on_with_the_same_bits(kind: str) -> None:
    inner = settings(optimizer=kind, learning_rate=0.1)
    whole, first, second = parameters(), parameters(), parameters()
    take_steps(build_inner_optimizer(inner, whole), 0, 6)

    stopped = build_inner_optimizer(inner, first)
    take_steps(stopped, 0, 3)
    tensors = {name: tensor.clone() for name, tensor in state_tensors(stopped).items()}
    for name, source in first.items():
        second[name].data.copy_(source.data)
    resumed = build_inner_optimizer(inner, second)
    load_state_tensors_(resumed, tensors)
    take_steps(resumed, 3, 6)
    assert all(torch.equal(whole[name], second[name]) for name in whole)


def test_the_state_of_adamw_is_two_moments_and_a_count_for_each_parameter() -> None:
    optimizer = build_inner_optimizer(settings(learning_rate=0.1), parameters())
    assert state_tensors(optimizer) == {}
    take_steps(optimizer, 0, 2)
    tensors = state_tensors(optimizer)
    assert sorted(tensors) == [f"{number}.{name}" for number in (0, 1) for name in ("exp_avg", "exp_avg_sq", "step")]
    assert tensors["1.exp_avg"].shape == (5,)
    assert tensors["0.step"].item() == 2.0


def test_loading_state_keeps_the_recipes_own_settings() -> None:
    """A run taken up again with another learning rate must not get the old one back from a checkpoint."""
    old = build_inner_optimizer(settings(learning_rate=0.1), parameters())
    take_steps(old, 0, 1)
    new = build_inner_optimizer(settings(learning_rate=0.2, weight_decay=0.3), parameters())
    load_state_tensors_(new, state_tensors(old))
    assert (new.param_groups[0]["lr"], new.param_groups[0]["weight_decay"]) == (0.2, 0.3)


def test_adamw_is_torchs_with_the_recipes_numbers() -> None:
    inner = settings(learning_rate=0.1, betas=(0.8, 0.9), epsilon=1e-6, weight_decay=0.5)
    ours, theirs = parameters(), parameters()
    take_steps(build_inner_optimizer(inner, ours), 0, 4)
    take_steps(torch.optim.AdamW(theirs.values(), lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5), 0, 4)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-6)


# ---- Muon ----

MODEL = {
    "embed_tokens.weight": (8, 4),
    "layers.0.up.weight": (6, 4),
    "layers.0.down.weight": (4, 6),
    "layers.0.norm.weight": (4,),
    "lm_head.weight": (9, 4),
}


def test_muon_steps_hidden_matrices_as_torchs_muon_and_the_rest_as_adamw() -> None:
    inner = settings(optimizer="muon", learning_rate=0.1, weight_decay=0.3)
    ours, theirs = parameters(MODEL), parameters(MODEL)
    take_steps(build_inner_optimizer(inner, ours), 0, 3)
    hidden = [theirs[name] for name in ("layers.0.up.weight", "layers.0.down.weight")]
    rest = [theirs[name] for name in ("embed_tokens.weight", "layers.0.norm.weight", "lm_head.weight")]
    take_steps(torch.optim.Muon(hidden, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"), 0, 3)
    take_steps(torch.optim.AdamW(rest, lr=0.1, betas=(0.9, 0.95), weight_decay=0.3, fused=True), 0, 3)
    assert all(torch.equal(ours[name], theirs[name]) for name in MODEL)


def test_the_state_of_muon_is_one_momentum_a_matrix_and_loads_by_number() -> None:
    inner = settings(optimizer="muon", learning_rate=0.1)
    old, new = (build_inner_optimizer(inner, parameters(MODEL)) for _ in range(2))
    take_steps(old, 0, 2)
    tensors = state_tensors(old)
    assert [key for key in tensors if key.endswith("momentum_buffer")] == ["0.momentum_buffer", "1.momentum_buffer"]
    assert tensors["2.exp_avg"].shape == (8, 4)
    assert len(tensors) == 2 + 3 * 3
    load_state_tensors_(new, tensors)
    found = state_tensors(new)
    assert list(found) == list(tensors)
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("shapes", [{"layers.0.weight": (3, 4)}, {"embed.weight": (3, 4), "norm": (4,)}])
def test_a_model_may_have_only_hidden_matrices_or_none(shapes: dict[str, tuple[int, ...]]) -> None:
    optimizer = build_inner_optimizer(settings(optimizer="muon"), parameters(shapes))
    take_steps(optimizer, 0, 1)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("name", "shape", "hidden"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (4, 4), True),
        ("model.layers.0.mlp.gate_proj.bias", (4,), False),
        ("model.embed_tokens.weight", (9, 4), False),
        ("transformer.wte.weight", (9, 4), False),
        ("transformer.wpe.weight", (9, 4), False),
        ("lm_head.weight", (9, 4), False),
        ("conv.weight", (4, 4, 3), False),
    ],
)
def test_hidden_matrices_are_known_by_shape_and_name(name: str, shape: tuple[int, ...], hidden: bool) -> None:
    assert is_hidden_matrix(name, torch.zeros(shape)) == hidden


def test_a_torch_without_muon_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"torch \S+ has no Muon"):
        build_inner_optimizer(settings(optimizer="muon"), parameters())
    build_inner_optimizer(settings(), parameters())
