"""The data: what a recipe says under `data`."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from diloco_ray.settings import Number, Settings


class DataSettings(Settings):
    """Which text, how it becomes tokens, and how long a sequence is."""

    corpus: str = Field(
        "stdlib",
        min_length=1,
        description="stdlib (Python's own source) | parquet, jsonl or txt: a file, glob or folder on any fsspec path"
        " | the name of a Hugging Face dataset",
    )
    subset: str | None = Field(None, description="configuration of a Hugging Face dataset")
    split: str = Field("train", description="split of a Hugging Face dataset; validation is cut from it")
    text_column: str = "text"
    tokenizer: str = Field(
        "bytes",
        min_length=1,
        description="bytes | train:4096 (byte-level BPE of that size) | folder or name of a Hugging Face tokenizer",
    )
    sequence_length: int = Field(128, ge=2, description="tokens per sequence")
    validation_fraction: Number = Field(0.02, gt=0, lt=0.5, description="of the documents, chosen by their sha256")
    prepared: str | None = Field(None, description="folder of the token shards; null: beside the runs")
    max_documents: int | None = Field(None, ge=1, description="only the first so many documents")
    shards: Literal["iid", "label", "cluster"] = Field(
        "iid", description="iid: all islands draw from all text; else island m from group m mod the number of groups"
    )
    label_column: str | None = Field(None, min_length=1, description="shards=label: its values are the groups")
    clusters: int | None = Field(None, ge=2, description="shards=cluster: how many groups k-means makes")

    @field_validator("tokenizer")
    @classmethod
    def _trained_has_room(cls, value: str) -> str:
        word, colon, size = value.partition(":")
        if colon and word != "train" and "/" not in value:
            meant = f"train:{size}" if size.isdecimal() else "bytes, train:4096"
            raise ValueError(f"no tokenizer has such a name; did you mean {meant}, or ./{value} for a folder?")
        size = value.removeprefix("train:")
        if size != value and not (size.isdecimal() and int(size) >= 257):
            raise ValueError(
                "a trained tokenizer needs room for 256 bytes and the end of a document; choose train:257 or more"
            )
        return value

    @model_validator(mode="after")
    def _groups_are_named(self) -> "DataSettings":
        if self.shards == "label" and self.label_column is None:
            raise ValueError(
                "shards=label without label_column; set data.label_column to the column whose values are the groups"
            )
        if self.shards == "cluster" and self.clusters is None:
            raise ValueError(
                "shards=cluster without clusters; set data.clusters to the number of groups, at most that of islands"
            )
        return self

    def content(self) -> dict[str, Any]:
        """The fields that decide what the token shards hold; sequences are cut from them later.

        What a field that `shards` does not look at says makes no difference: it is null here.
        """
        unused = {"label": "clusters", "cluster": "label_column"}.get(self.shards)
        kept = self.model_dump(mode="json", exclude={"prepared", "sequence_length"})
        return {**kept, **dict.fromkeys([unused] if unused else ["clusters", "label_column"])}
