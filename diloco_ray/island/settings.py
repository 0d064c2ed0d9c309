"""The inner loop: what a recipe says under `inner`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from diloco_ray.settings import Number, Settings

Beta = Annotated[Number, Field(ge=0, lt=1)]


class InnerSettings(Settings):
    """H inner steps of AdamW per round, per island (arXiv 2311.08105, Algorithm 1, lines 5-8)."""

    steps_per_round: int = Field(100, ge=1, description="H: inner steps between two outer steps")
    steps: Literal["fixed", "by_speed"] = Field(
        "fixed", description="H for every island | floor(v / v_max H) at its speed v (DyLU, arXiv 2401.09135)"
    )
    batch_size: int = Field(8, ge=1, description="sequences per inner step and island")
    accumulate: int = Field(1, ge=1, description="equal parts that a batch is computed in")
    ranks: int = Field(1, ge=1, description="processes of one island, each with an accelerator, that share its batch")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="of several ranks: each has the whole model | its rows of every tensor (FSDP2)"
    )
    optimizer: Literal["adamw", "muon", "sgd"] = Field(
        "adamw", description="muon: for hidden matrices, with AdamW for the rest (MuLoCo, arXiv 2505.23725)"
    )
    learning_rate: Number = Field(4e-4, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0, description="global inner steps")
    final_learning_rate_ratio: Number = Field(0.05, ge=0, le=1, description="of cosine (arXiv 2503.09799: to 5 %)")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), strict=False)
    epsilon: Number = Field(1e-8, gt=0)
    weight_decay: Number = Field(0.1, ge=0)
    clip_norm: Number | None = Field(1.0, gt=0, description="of the inner gradients; outer gradients are not clipped")
    joiner_ramp_steps: int = Field(20, ge=0, description="learning-rate ramp of an island without optimizer state")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the forward and backward pass")
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(1, ge=1, description="CPU threads of one island; null leaves torch's own choice")
    checkpoint_every_rounds: int = Field(
        1, ge=1, description="1 brings an interrupted run back bit for bit; more saves writing the optimizer's state"
    )
    checkpoints: str | None = Field(
        None, description="where islands keep optimizer state (default: the run folder if local, else a local cache)"
    )

    @model_validator(mode="after")
    def _parts_are_equal(self) -> "InnerSettings":
        if self.batch_size % self.accumulate:
            what = f"batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate}"
            raise ValueError(f"{what}; choose inner.accumulate so that it divides inner.batch_size")
        parts = self.accumulate * self.ranks
        if self.batch_size % parts:
            given = f"batch_size={self.batch_size} with ranks={self.ranks} and accumulate={self.accumulate}"
            raise ValueError(f"{given} cannot be dealt out evenly; choose inner.batch_size as a multiple of {parts}")
        if self.ranks > 1 and self.compile:
            raise ValueError(
                f"compile=true with ranks={self.ranks} is not supported; set inner.compile=false, or inner.ranks=1"
            )
        if self.ranks > 1 and self.parallel == "fsdp" and self.optimizer == "muon":
            what = f"optimizer=muon with ranks={self.ranks} and parallel=fsdp: Muon needs whole matrices"
            raise ValueError(f"{what}; set inner.parallel=ddp, or inner.optimizer=adamw")
        return self
