"""The data: what a recipe says under `data`."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator


class DataSettings(BaseModel):
    """Which text, how it becomes tokens, and how long a sequence is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
    validation_fraction: float = Field(0.02, gt=0, lt=0.5, description="of the documents, chosen by their sha256")
    prepared: str | None = Field(None, description="folder of the token shards; null: beside the runs")
    max_documents: int | None = Field(None, ge=1, description="only the first so many documents")

    @field_validator("tokenizer")
    @classmethod
    def _trained_has_room(cls, value: str) -> str:
        size = value.removeprefix("train:")
        if size != value and not (size.isdecimal() and int(size) >= 257):
            raise ValueError(
                "a trained tokenizer needs room for 256 bytes and the end of a document: train:257 or more"
            )
        return value

    def content(self) -> dict[str, Any]:
        """The fields that decide what the shards hold; sequences are cut from them later."""
        return self.model_dump(mode="json", exclude={"prepared", "sequence_length"})
