"""diloco_ray: elastic low-communication training of language models across badly connected clusters, on Ray.

The names below load on first use, so that `import diloco_ray` stays free of ray and torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diloco_ray.api import DiLoCoTrainer, Result
    from diloco_ray.config import RunConfig

__version__ = "0.1.0"
__all__ = ["DiLoCoTrainer", "Result", "RunConfig"]


def __getattr__(name: str) -> Any:
    if name == "RunConfig":
        from diloco_ray.config import RunConfig

        return RunConfig
    if name in ("DiLoCoTrainer", "Result"):
        from diloco_ray import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
