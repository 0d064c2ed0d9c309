"""An island with several accelerators: one `TorchTrainer.fit()` of Ray Train for its whole life.

The outer rounds go on inside the train function, so the seconds that a fit takes to start are spent once. Ray Train
places the ranks, makes their process group and ends all of them when one is lost; it does not start them again: the
driver does, as it starts any island again.
"""

import os
import tempfile
from typing import Any

from ray import exceptions
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError, WorkerGroupError

from diloco_ray.config import ClusterSettings
from diloco_ray.coordination.settings import SyncSettings
from diloco_ray.errors import ClusterError
from diloco_ray.island.gang import RankLostError
from diloco_ray.island.job import IslandJob
from diloco_ray.runtime.cluster import selector_of
from diloco_ray.runtime.island_process import PREEMPTED, Connect


def live_as_gang(
    cluster: ClusterSettings,
    home: Any,
    job: IslandJob,
    name: str,
    process: str,
    connect: Connect,
    sync: SyncSettings,
    speed: float = 1.0,
) -> str:
    """As `island_process.live_as_island`, with job.inner.ranks processes. Raises what ended the first rank to fail.

    home: the island's GangActor, which knows whether it has been sent home.
    """

    def rank() -> str:
        from diloco_ray.runtime.island_process import live_as_rank

        return live_as_rank(job, name, process, connect, sync, speed, cluster.rank_timeout_s, home)

    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # a recipe's relative paths are meant from where the driver is
    # Ray Train wants a folder, and has nothing to keep in it; a temporary one would outlive an actor that is ended.
    scratch = os.path.join(tempfile.gettempdir(), f"dr-gang-{os.getuid()}")
    trainer = TorchTrainer(
        rank,
        torch_config=TorchConfig(timeout_s=int(cluster.rank_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=job.inner.ranks,
            use_gpu=cluster.island_resources.get("GPU", 0) > 0,
            resources_per_worker=dict(cluster.island_resources),
            placement_strategy="PACK",
            label_selector=selector_of(cluster, name) or None,
        ),
        run_config=RunConfig(
            name=f"{name}-{process[:8]}",
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
        ),
    )
    try:
        result: Any = trainer.fit()
    except PreemptionError:  # Ray Train saw the notice as well
        return PREEMPTED
    except TrainingFailedError as error:
        raise cause_of(error, name) from error
    return result.return_value


def cause_of(error: Exception, name: str) -> Exception:
    """Of a fit that failed: that a rank died, or what one raised, rather than that others missed it."""
    if not isinstance(error, WorkerGroupError):
        return ClusterError(f"Ray Train gave the ranks up: {_first_line(error)}", where=name)
    failures = sorted(error.worker_failures.items())
    for rank, cause in failures:
        died = getattr(cause, "health_check_failure", cause)
        if isinstance(died, exceptions.RayError):
            return ClusterError(f"rank {rank} died: {_first_line(died)}", where=name)
    own = [cause for _, cause in failures if not isinstance(cause, RankLostError)]
    return (own or [cause for _, cause in failures])[0]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
