"""Which model: what a recipe says under `model`."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class ModelSettings(BaseModel):
    """Exactly one of the three ways to name a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: dict[str, Any] | None = None
    path: str | None = None
    factory: str | None = None

    @model_validator(mode="after")
    def _one_of_three(self) -> "ModelSettings":
        given = [name for name in ("config", "path", "factory") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"name exactly one of config, path and factory (given: {', '.join(given) or 'none'})")
        return self
