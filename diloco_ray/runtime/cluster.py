"""The Ray cluster: connecting to one or starting one, and the islands' places in it."""

import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray import exceptions
from ray._private import worker as rays_worker
from ray._private.state import state as rays_state
from ray.util.placement_group import placement_group, remove_placement_group

from diloco_ray.config import ClusterSettings
from diloco_ray.errors import ClusterError
from diloco_ray.runtime.island_actor import GANG_CALLS, GangActor, IslandActor

POLL_S = 0.25
LISTENS_WITHIN_S = 10.0
WANTS_A_TOKEN = "if it has token authentication on, export RAY_AUTH_MODE=token and its token as RAY_AUTH_TOKEN"
OWN = "{island}"  # in a label's value: the island's own name


@contextlib.contextmanager
def connected(address: str | None, **local: Any) -> Iterator[None]:
    """This process's own Ray, else the one that `address` or RAY_ADDRESS names, else a local one for this run.

    local: more of ray.init's arguments, for a local one.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    with tempfile.TemporaryDirectory(prefix="dr-", ignore_cleanup_errors=True) as scratch:
        heard = signal.getsignal(signal.SIGTERM)
        remedy = "start one with `ray start --head`, or leave the address out to start a local one"
        try:
            if address and address != "local":
                _check_that_it_listens(address)
                remedy = f"{WANTS_A_TOKEN}; else look at its head's log"  # somebody is there
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                # A bare init would follow a stale cluster file; the path is short because sockets' paths must be.
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=scratch,
                    **local,
                )
        except (OSError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"no Ray cluster answers: {error}",
                where=address or "local",
                remedy=remedy,
            ) from error
        is_main = threading.current_thread() is threading.main_thread()  # only there can handlers be set
        if is_main:  # Ray's own ends in a trace and an abort
            signal.signal(signal.SIGTERM, signal.default_int_handler if heard in (None, signal.SIG_DFL) else heard)
        try:
            yield
        finally:
            ray.shutdown()
            if is_main:
                signal.signal(signal.SIGTERM, heard or signal.SIG_DFL)


def _check_that_it_listens(address: str) -> None:
    """Ray itself would try a wrong address for minutes. OSError where nobody listens; names that Ray resolves pass."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=LISTENS_WITHIN_S).close()


def selector_of(settings: ClusterSettings, island: str) -> dict[str, str]:
    """The labels of the nodes that may hold this island: its own where the recipe says `{island}`."""
    return {key: value.replace(OWN, island) for key, value in settings.label_selector.items()}


def placeable(settings: ClusterSettings, islands: Sequence[str], ranks: int) -> list[str]:
    """Those of the islands that the nodes of this moment can hold, by their total resources and labels, in order.

    An island of several ranks may lie on several nodes.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    room = [_fits(node, settings) for node in nodes]
    placed: list[str] = []
    for island in islands:
        selector = selector_of(settings, island).items()
        ours = [all(node.get("Labels", {}).get(key) == value for key, value in selector) for node in nodes]
        places = [at for at, is_ours in enumerate(ours) if is_ours for _ in range(room[at])][:ranks]
        if len(places) == ranks:
            placed.append(island)
            for at in places:
                room[at] -= 1
    return placed


def _fits(node: dict[str, Any], settings: ClusterSettings) -> int:
    return min(int(node["Resources"].get(name, 0.0) / amount + 1e-6) for name, amount in _wanted(settings).items())


def _wanted(settings: ClusterSettings) -> dict[str, float]:
    """Of each rank."""
    return {name: amount for name, amount in settings.island_resources.items() if amount > 0}


def this_node_is_draining() -> bool:
    """Whether Ray is about to take away the node that this worker runs on: preemption, scaling down, `ray drain-node`.

    Ray has no public word for it; Ray Train asks the same way. A Ray that does not know the question drains nothing.
    """
    draining = getattr(rays_state, "get_draining_nodes", dict)
    return ray.get_runtime_context().get_node_id() in draining()


def wait_for_places(
    settings: ClusterSettings,
    islands: Sequence[str],
    ranks: int,
    tell: Callable[[str], None],
    *,
    least: int,
    within_s: float,
    where: str,
    more: str,
    less: str,
) -> None:
    """Until the least of the islands can be placed; meanwhile Ray's autoscaler is asked for room for all of them. Tells
    what is missing; ClusterError if it is for too long, and at once where nobody will add nodes. more, less: the two
    remedies, of which a Ray that was started here has but the second.
    """
    if len(placeable(settings, islands, ranks)) >= least:
        return
    shortage = _describe_shortage(settings, islands, ranks, least)
    if _is_own():
        remedy = f"{less}, or name a cluster that has more in RAY_ADDRESS"
        raise ClusterError(f"{shortage}, and this Ray, started here, gets no others", where=where, remedy=remedy)
    tell(f"{shortage}; waiting up to {within_s:g} s")
    until_s = time.monotonic() + within_s
    with _asked_for(settings, islands, ranks):
        while len(placeable(settings, islands, ranks)) < least:
            if time.monotonic() > until_s:
                shortage = _describe_shortage(settings, islands, ranks, least)
                raise ClusterError(f"{shortage} after {within_s:g} s", where=where, remedy=f"{more}, or {less}")
            time.sleep(POLL_S)


@contextlib.contextmanager
def _asked_for(settings: ClusterSettings, islands: Sequence[str], ranks: int) -> Iterator[None]:
    """In this block a placement group stands in for each island: demand, as the islands themselves are afterwards.

    Unlike `request_resources` it asks for each island by itself, so that a cluster which cannot grow to hold all of
    them grows to hold some; it replaces nobody else's request; and it ends with this process, however that ends.
    """
    groups: list[Any] = []
    try:
        for island in islands:
            selector = selector_of(settings, island)
            labels: dict[str, Any] = {"bundle_label_selector": [selector] * ranks} if selector else {}
            groups.append(placement_group([_wanted(settings)] * ranks, strategy="PACK", **labels))
        yield
    finally:
        for group in groups:
            remove_placement_group(group)


def _is_own() -> bool:
    """Whether this very process has started the Ray that it is connected to. Ray has no public word for it."""
    node: Any = rays_worker._global_node
    return node is not None and node.is_head()


def _describe_shortage(settings: ClusterSettings, islands: Sequence[str], ranks: int, least: int) -> str:
    """What the cluster lacks for the least of these islands, in numbers."""
    placed = placeable(settings, islands, ranks)
    have = ray.cluster_resources()
    parts = [
        f"{name}: {amount * least * ranks:g} needed, {have.get(name, 0.0):g} in the cluster"
        for name, amount in _wanted(settings).items()
    ]
    of_ranks = f" of {ranks} ranks" if ranks > 1 else ""
    labels = f" on nodes labelled {settings.label_selector}" if settings.label_selector else ""
    if any(OWN in value for value in settings.label_selector.values()):
        parts.append(f"no node for {', '.join(island for island in islands if island not in placed)}")
    return f"the cluster can place {len(placed)} of at least {least} islands{of_ranks}{labels} ({'; '.join(parts)})"


class Place:
    """An island's place in the cluster. actor: to be told `live`."""

    def __init__(self, settings: ClusterSettings, island: str, ranks: int):
        selector = selector_of(settings, island)
        self._placement_group: Any = None
        if ranks > 1:  # the actor of a gang takes nothing but care
            options = {**actor_options({}, selector), "max_concurrency": GANG_CALLS}
            self.actor: Any = GangActor.options(**options).remote(settings)
            self._placement_group = self.actor.placement_group.remote()
        else:
            self.actor = IslandActor.options(**actor_options(settings.island_resources, selector)).remote()

    def wait_for_ranks(self, life: Any, within_s: float) -> bool:
        """Until its ranks are there, or the call that is its life has ended; whether that was in time."""
        return self._placement_group is None or bool(ray.wait([self._placement_group, life], timeout=within_s)[0])

    def clear(self) -> None:
        """Ends what is there, and frees the ranks' placement group, which Ray keeps when an actor is killed."""
        ray.kill(self.actor, no_restart=True)
        if self._placement_group is None or not ray.wait([self._placement_group], timeout=0)[0]:
            return
        with contextlib.suppress(exceptions.RayError):
            remove_placement_group(ray.get(self._placement_group, timeout=POLL_S))


def actor_options(resources: Mapping[str, float], label_selector: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Ray's options for an actor that asks for these resources on nodes with these labels."""
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    options: dict[str, Any] = {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0)}
    if others:
        options["resources"] = others
    if label_selector:
        options["label_selector"] = dict(label_selector)
    return options
