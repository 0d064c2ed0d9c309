"""What a failed fit says: which rank died, or what one of them raised."""

import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from diloco_ray.errors import ClusterError, DataError
from diloco_ray.island.gang import RankLostError
from diloco_ray.runtime.gang_process import cause_of

MISSED = RankLostError("rank 0 of 2 waited 0.1 s for rank 1 (plan): Connection closed by peer")
READ_ERROR = RuntimeError("Read error: Connection reset by peer")  # of a gradient's way
DEAD = WorkerHealthCheckFailedError("no answer", RayActorError(error_msg="The actor died.\nIts pid was 7."))
OWN = DataError("group 0 has 3 sequences, fewer than batch_size=4")


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ({0: MISSED, 1: DEAD}, ClusterError("rank 1 died: The actor died.", where="eu-1")),
        ({0: READ_ERROR, 1: DEAD}, ClusterError("rank 1 died: The actor died.", where="eu-1")),
        ({0: MISSED, 1: OWN}, OWN),
        ({0: OWN, 1: MISSED}, OWN),
        ({0: MISSED}, MISSED),
        ({0: READ_ERROR}, READ_ERROR),
    ],
)
def test_the_cause_is_named_rather_than_those_that_missed_it(failures: dict[int, Exception], cause: Exception) -> None:
    found = cause_of(WorkerGroupError("", failures), "eu-1")
    assert (type(found), str(found)) == (type(cause), str(cause))


def test_a_controller_that_fails_is_the_clusters_fault() -> None:
    found = cause_of(ControllerError(RuntimeError("no node is left")), "eu-1")
    assert isinstance(found, ClusterError)
    assert "Ray Train gave the ranks up" in found.what
