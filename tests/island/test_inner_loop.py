"""The inner loop, on a small language model without transformers."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diloco_ray.island.inner_loop import InnerLoop, InnerResult
from diloco_ray.island.inner_optimizer import build_inner_optimizer
from diloco_ray.island.parallel import Alone
from diloco_ray.island.settings import InnerSettings
from diloco_ray.model.build import trainable_parameters

VOCABULARY = 11


class Bigrams(nn.Module):
    """The next token from the one before it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.seen: list[tuple[torch.dtype, int, bool]] = []  # dtype of the logits, sequences, training

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.head(self.embedding(input_ids))
        self.seen.append((logits.dtype, len(input_ids), self.training))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss)


def data(num_batches: int, batch_size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(VOCABULARY, (batch_size, 6), generator=generator) for _ in range(num_batches)]


def settings(**fields: Any) -> InnerSettings:
    plain = {"optimizer": "sgd", "learning_rate": 0.5, "weight_decay": 0.0, "clip_norm": None, "batch_size": 4}
    return InnerSettings(**{**plain, **fields})


def loop_of(
    model: nn.Module,
    inner: InnerSettings,
    batches: list[Tensor],
    learning_rate: Callable[[int], float] | None = None,
) -> InnerLoop:
    optimizer = build_inner_optimizer(inner, trainable_parameters(model))
    return InnerLoop(
        Alone(model), optimizer, batches, inner, learning_rate=learning_rate or (lambda step: inner.learning_rate)
    )


def train(model: nn.Module, inner: InnerSettings, batches: list[Tensor]) -> InnerResult:
    loop = loop_of(model, inner, batches)
    assert list(loop) == list(range(1, len(batches) + 1))
    assert (loop.num_steps, loop.num_tokens) == (len(batches), sum(batch.numel() for batch in batches))
    return loop.result()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_loop_is_the_plain_one() -> None:
    ours, theirs = Bigrams(), Bigrams()
    result = train(ours, settings(), data(5))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.5)
    losses: list[float] = []
    norms: list[float] = []
    for batch in data(5):
        optimizer.zero_grad()
        loss = theirs(batch, batch).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.cat([p.grad.flatten() for p in theirs.parameters() if p.grad is not None]).norm().item())
        optimizer.step()
    assert torch.equal(flat(ours), flat(theirs))
    assert result.loss == pytest.approx(sum(losses) / 5)
    assert result.gradient_norm == pytest.approx(sum(norms) / 5)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_computed_in_equal_parts_gives_the_step_of_the_whole(parts: int) -> None:
    whole, cut = Bigrams(), Bigrams()
    a = train(whole, settings(clip_norm=0.5), data(5))
    b = train(cut, settings(clip_norm=0.5, accumulate=parts), data(5))
    torch.testing.assert_close(flat(cut), flat(whole), rtol=0.0, atol=1e-5)
    assert b.loss == pytest.approx(a.loss, abs=1e-5)
    assert b.gradient_norm == pytest.approx(a.gradient_norm, abs=1e-5)
    assert {sequences for _, sequences, _ in cut.seen} == {4 // parts}


def test_a_step_of_clipped_gradients_is_as_long_as_the_limit_allows() -> None:
    model = Bigrams()
    before = flat(model)
    result = train(model, settings(clip_norm=0.01, learning_rate=1.0), data(1))
    assert (flat(model) - before).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert result.gradient_norm > 0.1  # reported as it was


def test_gradients_below_the_limit_are_left_as_they_are() -> None:
    clipped, free = Bigrams(), Bigrams()
    train(clipped, settings(clip_norm=1e6), data(3))
    train(free, settings(clip_norm=None), data(3))
    assert torch.equal(flat(clipped), flat(free))


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters() -> None:
    short, exact = Bigrams(), Bigrams()
    result = train(short, settings(precision="bfloat16"), data(5))
    expected = train(exact, settings(), data(5))
    assert {dtype for dtype, _, _ in short.seen} == {torch.bfloat16}
    assert {dtype for dtype, _, _ in exact.seen} == {torch.float32}
    assert {p.dtype for p in short.parameters()} == {torch.float32}
    assert result.loss == pytest.approx(expected.loss, rel=0.05)
    assert not torch.equal(flat(short), flat(exact))


def test_each_step_has_the_rate_of_its_number() -> None:
    """From 0; at rate 0 nothing moves."""
    model = Bigrams()
    moved: list[bool] = []
    before = flat(model)
    for _ in loop_of(model, settings(), data(4), learning_rate=lambda step: 0.5 * (step % 2)):
        moved.append(not torch.equal(flat(model), before))
        before = flat(model)
    assert moved == [False, True, False, True]


def test_nothing_is_done_before_a_step_is_asked_for_and_one_step_each_time() -> None:
    model, expected = Bigrams(), Bigrams()
    loop = loop_of(model, settings(), data(3))
    assert torch.equal(flat(model), flat(expected))
    for done in (1, 2, 3):
        assert next(loop) == done
        expected = Bigrams()
        train(expected, settings(), data(done))
        assert torch.equal(flat(model), flat(expected))
    with pytest.raises(StopIteration):
        next(loop)
    assert torch.equal(flat(model), flat(expected))


def test_the_means_are_those_of_the_steps_so_far() -> None:
    loop = loop_of(Bigrams(), settings(), data(4))
    for done in (1, 2, 3, 4):
        next(loop)
        assert loop.result() == train(Bigrams(), settings(), data(done))
        assert (loop.num_steps, loop.num_tokens) == (done, done * 4 * 6)


def test_a_loop_that_is_left_leaves_the_model_between_two_steps() -> None:
    abandoned, expected = Bigrams(), Bigrams()
    for step in loop_of(abandoned, settings(), data(5)):
        assert all(parameter.grad is None for parameter in abandoned.parameters())
        if step == 2:
            break
    train(expected, settings(), data(2))
    assert torch.equal(flat(abandoned), flat(expected))


def test_parameters_written_between_two_steps_are_those_that_the_next_step_starts_from() -> None:
    """A merge: the loop goes on from it, with the optimizer's state as it was."""
    model, expected = Bigrams(), Bigrams()
    loop = loop_of(model, settings(), data(2))
    next(loop)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), expected.parameters()):
            ours.copy_(theirs.mul_(0.5))
    next(loop)
    train(expected, settings(), data(2)[1:])
    assert torch.equal(flat(model), flat(expected))


def test_the_model_trains_in_training_mode_even_if_it_was_left_in_another() -> None:
    model = Bigrams()
    model.eval()
    train(model, settings(), data(1))
    assert [training for _, _, training in model.seen] == [True]


def test_frozen_parameters_stay_and_do_not_count_in_the_norm() -> None:
    model, free = Bigrams(), Bigrams()
    model.embedding.weight.requires_grad_(False)
    before = model.embedding.weight.clone()
    (batch,) = data(1)
    gradients = torch.autograd.grad(free(batch, batch).loss, list(free.head.parameters()))
    result = train(model, settings(), [batch])
    assert torch.equal(model.embedding.weight, before)
    assert result.gradient_norm == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item())


def test_no_batches_are_no_steps() -> None:
    model = Bigrams()
    before = flat(model)
    result = train(model, settings(), [])
    assert (result.loss, result.gradient_norm) == (0.0, 0.0)
    assert torch.equal(flat(model), before)
