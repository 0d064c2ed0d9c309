"""run.json, who a run is: its recipe, its model's layout, its data; and what follows: record 0, and its replicas."""

from collections.abc import Mapping
from typing import Any

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.algorithm.fragments import Layout
from diloco_ray.algorithm.replica import Replica
from diloco_ray.algorithm.settings import OuterSettings
from diloco_ray.config import RunConfig
from diloco_ray.data.shards import TokenShards
from diloco_ray.errors import RunMismatchError
from diloco_ray.ids import new_run_id
from diloco_ray.log.record import Record, model_digest, seal
from diloco_ray.log.run_log import RunLog
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.snapshot import save_snapshot
from diloco_ray.model.build import build_model, check_length, parameter_shapes, trainable_parameters
from diloco_ray.plan import layout_of

FORMAT_VERSION = 1
DOCUMENT = "run.json"


def replica_of(document: Mapping[str, Any]) -> Replica:
    """An empty replica of the run that this document names."""
    downlink = get_codec(document["config"]["sync"]["downlink"])
    return Replica(Layout.from_dict(document["layout"]), outer_of(document).build(), downlink)


def outer_of(document: Mapping[str, Any]) -> OuterSettings:
    """Outer settings in numbers: for the islands that the run was begun with, or a replay would find others."""
    config = RunConfig.from_dict(document["config"])
    return config.outer.for_islands(config.max_islands, one_by_one=config.sync.closes == "arrival")


def create(store: RunStore, config: RunConfig, shards: TokenShards) -> Mapping[str, Any]:
    """Writes run.json; RunMismatchError where another process was quicker."""
    model = _model(config, shards)
    layout = layout_of(config, parameter_shapes(model))
    body = {
        "format": FORMAT_VERSION,
        "run_id": new_run_id(),
        "config": config.model_dump(mode="json"),
        "identity": config.identity(),
        "layout": layout.to_dict(),
        "prepared": RunStore(config.prepared_url).url,
        "data_digest": shards.manifest.digest,
        "shard_sizes": shards.split("train").shard_sizes(config.data.sequence_length),
    }
    try:
        store.create(DOCUMENT, seal(body))
    except FileExistsError as error:
        raise RunMismatchError(
            "another process began a run in this folder at this moment",
            where=store.url,
            remedy="give the command again",
        ) from error
    return body


def _model(config: RunConfig, shards: TokenShards) -> Any:
    manifest = shards.manifest
    model = build_model(
        config.model, seed=config.seed, vocab_size=manifest.vocab_size, eos_token_id=manifest.eos_token_id
    )
    check_length(model, config.data.sequence_length)
    return model


def write_beginning(store: RunStore, document: Mapping[str, Any], config: RunConfig, prepared_url: str) -> None:
    """Snapshot 0 and record 0: one initialisation for all replicas. Done again, it writes the same."""
    if RunLog.open(store).records:
        return
    replica = replica_of(document)
    replica.load_from_(trainable_parameters(_model(config, TokenShards.open(prepared_url))))
    digest = model_digest([replica.digest(fragment.index) for fragment in replica.layout.fragments])
    record = Record(
        index=0,
        parent="",
        run_id=document["run_id"],
        fence_epoch=0,
        kind="init",
        fragment=0,
        version=0,
        round=0,
        codec=config.sync.downlink,
        payload="",
        payload_sha256="",
        shares=(),
        parameters_digest=digest.parameters,
        optimizer_digest=digest.optimizer,
        tokens=dict.fromkeys(("leased", "committed", "rejected", "expired", "rewound", "outstanding"), 0),
    )
    save_snapshot(store, 0, replica, record.digest())
    RunLog.open(store).append(record)
