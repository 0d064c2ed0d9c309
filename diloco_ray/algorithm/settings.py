"""What a recipe says about the outer step, checked; it does not know the presets that choose among these."""

from typing import Any, Literal

from pydantic import Field, field_validator

from diloco_ray.algorithm.combine import COMBINES, Combine
from diloco_ray.algorithm.outer_optimizer import SGD, Adam, DelayedNesterov, HeavyBall, Nesterov, OuterOptimizer
from diloco_ray.settings import Number, Settings, as_meant

# (most islands, eta): fitted for DiLoCo with Nesterov 0.9 at H = 30, whatever the model's size (arXiv 2503.09799).
_RATES_BY_ISLANDS = ((1, 0.4), (4, 0.6))
_RATE_OF_MORE_ISLANDS = 0.8


class OuterSettings(Settings):
    """The combine and the outer optimizer. Defaults of DiLoCo (arXiv 2311.08105); momentum is Adam's beta1."""

    combine: Literal["mean", "radial", "clipped_mean", "trimmed_mean", "median"] = "mean"
    optimizer: Literal["nesterov", "sgd", "heavy_ball", "adam", "delayed_nesterov"] = "nesterov"
    learning_rate: Number | Literal["by_islands"] = 0.7
    momentum: Number = Field(default=0.9, ge=0, lt=1)
    epsilon: Number = Field(default=0.1, gt=0)
    arrivals: int | None = Field(default=None, ge=1, description="N of delayed Nesterov (default: see for_islands)")
    statistics: bool = Field(default=False, description="norms and cosines of the outer gradients in the events")

    @field_validator("learning_rate", mode="before")
    @classmethod
    def _is_a_rate(cls, value: Any) -> Any:
        rate = as_meant(value)
        is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if rate != "by_islands" and not (is_number and 0 < rate < float("inf")):
            raise ValueError("neither a number above 0 nor by_islands; choose one such as 0.7")
        return rate

    @property
    def combine_function(self) -> Combine:
        return COMBINES[self.combine]

    @property
    def uses_weights(self) -> bool:
        """Whether a contribution's weight counts (with fewer than three, trimmed_mean is the mean)."""
        return self.combine not in ("trimmed_mean", "median")

    @property
    def is_linear(self) -> bool:
        """Whether all steps are one linear map of gradient and momentum, so that replicas can be stepped apart."""
        return self.optimizer in ("nesterov", "sgd", "heavy_ball")

    def for_islands(self, num_islands: int, *, one_by_one: bool) -> "OuterSettings":
        """The same with numbers for what depends on the number of islands: learning_rate and arrivals.

        one_by_one: every contribution is an outer step of its own, so that the islands' mean is that of as many steps
        as there are islands. Else each step is a mean already, and 1 of them makes a momentum step.
        """
        rates = [rate for most, rate in _RATES_BY_ISLANDS if num_islands <= most]
        learning_rate = (*rates, _RATE_OF_MORE_ISLANDS)[0] if self.learning_rate == "by_islands" else self.learning_rate
        arrivals = self.arrivals or (num_islands if one_by_one else 1)
        return self.model_copy(update={"learning_rate": learning_rate, "arrivals": arrivals})

    def build(self) -> OuterOptimizer:
        """ValueError where a number is still to come from `for_islands`."""
        if self.learning_rate == "by_islands":
            raise ValueError("learning_rate=by_islands is no number yet: resolve it with for_islands")
        match self.optimizer:
            case "nesterov":
                return Nesterov(self.learning_rate, self.momentum)
            case "sgd":
                return SGD(self.learning_rate)
            case "heavy_ball":
                return HeavyBall(self.learning_rate, self.momentum)
            case "adam":
                return Adam(self.learning_rate, beta1=self.momentum, epsilon=self.epsilon)
            case "delayed_nesterov":
                if self.arrivals is None:
                    raise ValueError("arrivals=None is no number yet: resolve it with for_islands")
                return DelayedNesterov(self.learning_rate, self.momentum, self.arrivals)
