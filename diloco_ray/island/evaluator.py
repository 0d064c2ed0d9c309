"""The evaluator: a follower of the log that measures the outer parameters on held-out text, away from the islands."""

from dataclasses import dataclass

import torch

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.algorithm.replica import Replica
from diloco_ray.data.shards import TokenShards
from diloco_ray.data.tokenizers import load_tokenizer
from diloco_ray.island.job import IslandJob
from diloco_ray.island.parallel import pick_device
from diloco_ray.model.build import build_model, trainable_parameters
from diloco_ray.model.export import sample_text, validation_loss
from diloco_ray.transport.follower import Follower
from diloco_ray.transport.protocol import Transport


@dataclass(frozen=True)
class EvaluationPlan:
    """At which rounds, on how much, and what to continue at the end."""

    every_rounds: int
    num_rounds: int
    num_sequences: int
    batch_size: int
    prompt: str
    sample_tokens: int


class Evaluator:
    """Replays every record and measures where the plan says: exactly those parameters, however late it is."""

    def __init__(self, job: IslandJob, plan: EvaluationPlan, transport: Transport):
        if job.inner.threads is not None:
            torch.set_num_threads(job.inner.threads)
        shards = TokenShards.open(job.prepared_url)
        self._plan, self._transport = plan, transport
        self._batches = validation_batches(shards, job.data.sequence_length, plan.num_sequences, plan.batch_size)
        self._model = build_model(
            job.model,
            seed=job.seed,
            vocab_size=shards.manifest.vocab_size,
            eos_token_id=shards.manifest.eos_token_id,
        ).to(pick_device(job.inner.device))
        self._tensors = trainable_parameters(self._model)
        self._tokenizer = load_tokenizer(shards.tokenizer_path)
        self._round = -1  # rounds that were whole at the last record
        self._follower = Follower(Replica(job.layout, job.outer.build(), get_codec(job.sync.downlink)), transport)

    def start(self) -> None:
        self._measured = self._transport.measured()
        nothing_yet = not self._measured  # it may have come late: a short run can be over by now
        self._measure_if_due(self._follower.load_snapshot(first=nothing_yet).round)

    def turn(self, wait_s: float) -> bool:
        """Follows the log; False when the run is over and measured."""
        news = self._transport.follow("", 0, self._follower.index, wait_s)
        for item in news.records:
            for record in self._follower.receive([item]):
                self._follower.replay(record.fragment)
                self._measure_if_due(record.round)
        return news.standing != "over"

    def _measure_if_due(self, round: int) -> None:
        """At the record with which a round becomes whole, where the plan says so for this round."""
        index, last = self._follower.index, round >= self._plan.num_rounds
        is_new, self._round = round > self._round, round
        if not is_new or index in self._measured or not (last or round % self._plan.every_rounds == 0):
            return
        self._measured.add(index)
        self._follower.replica.write_to_(self._tensors)
        loss = validation_loss(self._model, self._batches)
        sample = ""
        if last and self._plan.sample_tokens:
            sample = sample_text(
                self._model, self._tokenizer, self._plan.prompt, max_new_tokens=self._plan.sample_tokens, seed=0
            )
        self._transport.evaluated(index, round, {"loss": loss}, sample)


def validation_batches(
    shards: TokenShards, sequence_length: int, num_sequences: int, batch_size: int
) -> list[torch.Tensor]:
    """The first num_sequences of the validation split, (B, T) int64 each: the same ones for everybody who asks."""
    split = shards.split("validation")
    order = torch.arange(min(num_sequences, split.num_sequences(sequence_length)))
    return [torch.from_numpy(split.sequences(part.numpy(), sequence_length)) for part in order.split(batch_size)]
