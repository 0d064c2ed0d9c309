"""The model: what a recipe says under `model`."""

from typing import Any

from pydantic import Field, model_validator

from diloco_ray.ids import canonical_json
from diloco_ray.settings import Settings


class ModelSettings(Settings):
    """Exactly one of the three ways to say which model."""

    config: dict[str, Any] | None = Field(
        None, description="a transformers configuration with its model_type; vocab_size defaults to the tokenizer's"
    )
    path: str | None = Field(
        None, min_length=1, description="folder or Hugging Face name; weights are loaded where there are any"
    )
    factory: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="package.module:function that returns a module whose forward(input_ids, labels) has a .loss",
    )

    weights: str | None = Field(
        None, min_length=1, description="folder of an earlier export to start from, instead of at random"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> "ModelSettings":
        given = [name for name in ("config", "path", "factory") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"which model? (given: {', '.join(given) or 'none'}); give exactly one of config, path, factory"
            )
        if self.weights is not None and self.path is not None:
            raise ValueError("path brings its own weights; give model.weights with model.config or model.factory only")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config without model_type; name one that transformers knows, such as model_type: llama")
        try:
            canonical_json(self.config or {})
        except (TypeError, ValueError) as error:
            what = f"config={self.config} has a value that a run's document cannot keep: {error}"
            raise ValueError(f"{what}; write finite numbers, text, true, false, null, lists and mappings") from None
        return self
