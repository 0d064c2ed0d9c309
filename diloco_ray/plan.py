"""What a recipe comes to, before anything is prepared, begun or spent: its fields, its rounds, its bytes.

Bytes are those of encoded payloads. Data parallel is a float32 gradient up and down in every inner step. The model is
only outlined: no weights are made.
"""

import json
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.algorithm.fragments import Layout, partition
from diloco_ray.algorithm.schedule import send_steps
from diloco_ray.config import RunConfig
from diloco_ray.data.manifest import PreparedFolder, open_manifest
from diloco_ray.errors import ConfigError, DiLoCoError
from diloco_ray.model.build import check_folders, planned_shapes
from diloco_ray.observe.progress import human_bytes
from diloco_ray.observe.status import BYTES_PER_GRADIENT_VALUE
from diloco_ray.presets import PRESETS, flatten

# What the presets differ in is shown always; other fields of these sections, where they are no defaults.
DIALS = {path for fields in PRESETS.values() for path in fields if path.startswith(("inner.s", "outer.", "sync."))}
SECTIONS = ("inner", "outer", "sync", "experiment")


def plan_of(config: RunConfig, sources: Mapping[str, str]) -> dict[str, Any]:
    """A JSON document. sources: where a field comes from, by its path, if it is no default (`config.layered`).

    merged_at is None where an island merges what has come, whenever it comes.
    bytes, and of a fragment its size, are None where the vocabulary or the model is not known yet; `unknown` says why.
    ConfigError for a model that the run cannot be made with.
    """
    check_model(config)
    H, sync = config.inner.steps_per_round, config.sync
    as_it_comes = sync.closes == "quorum" and sync.overlap > 0
    shapes, unknown = _shapes(config)
    layout = layout_of(config, shapes) if shapes is not None else None
    fragments: list[dict[str, Any]] = [
        {"fragment": index, "sent_at": step, "merged_at": None if as_it_comes else step + sync.overlap}
        for index, step in enumerate(send_steps(H, sync.fragments, sync.offsets == "together"))
    ]
    if layout:
        for line, fragment in zip(fragments, layout.fragments):
            line["tensors"], line["values"] = len(fragment.slots), fragment.num_values
            line["bytes_up"] = get_codec(sync.uplink).num_bytes(fragment.num_values)
            line["bytes_down"] = get_codec(sync.downlink).num_bytes(fragment.num_values)
    tokens = H * config.inner.batch_size * config.data.sequence_length
    return {
        "preset": sync.preset,
        "fields": {
            path: {"value": value, "from": sources.get(path, "default")}
            for path, value in flatten(config.model_dump(mode="json")).items()
        },
        "islands": list(config.islands),
        "rounds": config.rounds,
        "steps_per_round": H,
        "inner_steps": config.num_inner_steps,
        "tokens": {"island_round": tokens, "run": tokens * config.rounds * config.max_islands},
        "parameters": layout.num_values if layout else None,
        "fragments": fragments,
        "bytes": _bytes(config, layout, fragments) if layout else None,
        "unknown": unknown,
    }


def plan_parts(document: Mapping[str, Any]) -> list[str | Table]:
    """The document for people: lines and tables."""
    least, most = document["islands"]
    islands = f"{most}" if least == most else f"{least} to {most}"
    H, tokens, sent = document["steps_per_round"], document["tokens"], document["bytes"]
    steps = f"{document['rounds']:,} rounds of {H:,} inner steps = {document['inner_steps']:,}"
    size = f", {document['parameters']:,} parameters" if document["parameters"] else ""
    parts: list[str | Table] = [
        f"preset {document['preset']}: {steps}; {islands} islands{size}",
        f"tokens: {tokens['island_round']:,} per island and round, {tokens['run']:,} with {most} islands to the end",
        "",
        _field_table(document),
        "",
        _fragment_table(document["fragments"], H),
        "",
    ]
    if sent is None:
        return [*parts, f"bytes: {document['unknown']}"]
    exchanged = f"{human_bytes(sent['up'])} up, {human_bytes(sent['down'])} down"
    times = f"{human_bytes(sent['data_parallel'])}, {sent['ratio']:,.1f} times as much"
    return [*parts, f"bytes: {exchanged} per island and round; float32 gradients in every step: {times}"]


def _field_table(document: Mapping[str, Any]) -> Table:
    table = Table("field", "value", "from", box=None, pad_edge=False)
    preset = PRESETS[document["preset"]]
    for path, field in document["fields"].items():
        source = field["from"]
        is_said = source != "default" and (path.split(".")[0] in SECTIONS or path in ("islands", "rounds"))
        if (path in DIALS or is_said) and path != "sync.preset":
            hidden = f" (preset: {preset[path]})" if preset.get(path, field["value"]) != field["value"] else ""
            value = field["value"] if isinstance(field["value"], str) else json.dumps(field["value"])
            table.add_row(path, value, source + hidden * (source != "preset"))
    return table


def _fragment_table(fragments: list[dict[str, Any]], steps_per_round: int) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("fragment", "tensors", "values", "sent after", "merged after", "up", "down"):
        table.add_column(column, justify="right")
    for line in fragments:
        merged = "as it comes" if line["merged_at"] is None else _step_of(line["merged_at"], steps_per_round)
        sizes = [human_bytes(line[way]) if way in line else "" for way in ("bytes_up", "bytes_down")]
        counts = [f"{line[count]:,}" if count in line else "" for count in ("tensors", "values")]
        table.add_row(str(line["fragment"]), *counts, str(line["sent_at"]), merged, *sizes)
    return table


def _step_of(count: int, steps_per_round: int) -> str:
    """An inner step of a round; (next): of the round after the one that the count began in."""
    later, step = divmod(count - 1, steps_per_round)
    return f"{step + 1}" + " (next)" * (later > 0)


def layout_of(config: RunConfig, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """The model's tensors in fragments, as the recipe has them. ConfigError where one would be empty."""
    try:
        return partition(shapes, config.sync.fragments, config.sync.partition)
    except ConfigError as error:
        what = error.what.replace("num_fragments", "sync.fragments")
        raise ConfigError(what, where="sync.fragments", remedy=f"sync.fragments: {error.remedy}") from error


def check_model(config: RunConfig) -> None:
    """ConfigError for what no vocabulary changes: folders that are not there, too few positions for a sequence, and
    fragments that the model cannot be cut into."""
    check_folders(config.model)
    if config.model.config is not None or config.sync.fragments > 1:
        length = config.data.sequence_length
        shapes = planned_shapes(config.model, vocab_size=1, eos_token_id=0, sequence_length=length)
        if shapes is not None:
            layout_of(config, shapes)


def _shapes(config: RunConfig) -> tuple[dict[str, tuple[int, ...]] | None, str]:
    """The model's tensors, or why they are not known."""
    if config.data.tokenizer == "bytes":
        vocab_size, eos_token_id = 256, 0
    else:
        try:
            manifest = open_manifest(PreparedFolder(config.prepared_url))
        except DiLoCoError:
            return None, f"the vocabulary of {config.data.tokenizer} is known once `diloco-ray prepare` is done"
        vocab_size, eos_token_id = manifest.vocab_size, manifest.eos_token_id
    shapes = planned_shapes(config.model, vocab_size=vocab_size, eos_token_id=eos_token_id)
    return shapes, "" if shapes is not None else "the model has to be loaded to know its tensors"


def _bytes(config: RunConfig, layout: Layout, fragments: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one island in one round. Where every arrival is a step of its own, an island receives that of every island."""
    steps = config.max_islands if config.sync.closes == "arrival" else 1
    up, down = sum(line["bytes_up"] for line in fragments), steps * sum(line["bytes_down"] for line in fragments)
    data_parallel = 2 * BYTES_PER_GRADIENT_VALUE * layout.num_values * config.inner.steps_per_round
    return {"up": up, "down": down, "data_parallel": data_parallel, "ratio": data_parallel / (up + down)}
