"""What a recipe says about the outer step, checked; it does not know the presets that choose among these."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from diloco_ray.algorithm.combine import COMBINES, Combine
from diloco_ray.algorithm.outer_optimizer import SGD, Adam, HeavyBall, Nesterov, OuterOptimizer


class OuterSettings(BaseModel):
    """The combine and the outer optimizer. Defaults of DiLoCo (arXiv 2311.08105); momentum is Adam's beta1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    combine: Literal["mean", "radial", "clipped_mean", "trimmed_mean", "median"] = "mean"
    optimizer: Literal["nesterov", "sgd", "heavy_ball", "adam"] = "nesterov"
    learning_rate: float = Field(default=0.7, gt=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    epsilon: float = Field(default=0.1, gt=0, allow_inf_nan=False)

    @property
    def combine_function(self) -> Combine:
        return COMBINES[self.combine]

    @property
    def uses_weights(self) -> bool:
        """Whether a contribution's weight counts (with fewer than three, trimmed_mean is the mean)."""
        return self.combine not in ("trimmed_mean", "median")

    def build(self) -> OuterOptimizer:
        match self.optimizer:
            case "nesterov":
                return Nesterov(self.learning_rate, self.momentum)
            case "sgd":
                return SGD(self.learning_rate)
            case "heavy_ball":
                return HeavyBall(self.learning_rate, self.momentum)
            case "adam":
                return Adam(self.learning_rate, beta1=self.momentum, epsilon=self.epsilon)
