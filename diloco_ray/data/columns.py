"""Columns of a corpus: text as UTF-8 bytes, labels as str; from arrow arrays and from rows of JSON.

This module does not know where rows come from or what labels are for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diloco_ray.errors import DataError


@dataclass(frozen=True)
class TextColumn:
    """Strings; null is an empty document."""

    name: str
    field = "data.text_column"

    def check(self, schema: Any, where: str) -> None:
        """DataError unless the schema has the column and it holds text."""
        import pyarrow.types as kinds

        kind = _kind_of(self, schema, where)
        if not _is_text(kinds, kind):
            raise self.unfit(str(kind), where)

    def of_arrow(self, column: Any, where: str) -> Iterator[bytes]:
        import pyarrow as pa

        return (text or b"" for text in _plain(column).cast(pa.large_binary()).to_pylist())

    def of_json(self, value: Any, where: str) -> bytes:
        if value is not None and not isinstance(value, str):
            raise self.unfit(f"{value!r:.60}", where)
        # A lone surrogate, which JSON can spell, has no UTF-8.
        return (value or "").encode("utf-8", "replace")

    def unfit(self, found: str, where: str) -> DataError:
        return DataError(f"column {self.name!r} holds {found}, not text", where=where, remedy=f"set {self.field}")


@dataclass(frozen=True)
class LabelColumn:
    """Strings, whole numbers or booleans; null is no label."""

    name: str
    field = "data.label_column"

    def check(self, schema: Any, where: str) -> None:
        """DataError unless the schema has the column and it can hold labels."""
        import pyarrow.types as kinds

        kind = _kind_of(self, schema, where)
        if not (_is_text(kinds, kind) or kinds.is_integer(kind) or kinds.is_boolean(kind)):
            raise self.unfit(str(kind), where)

    def of_arrow(self, column: Any, where: str) -> Iterator[str]:
        return (self.of_json(value, where) for value in _plain(column).to_pylist())

    def of_json(self, value: Any, where: str) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if not isinstance(value, str | int):
            raise self.unfit(f"{value!r:.60}", where)
        return str(value)

    def unfit(self, found: str, where: str) -> DataError:
        remedy = f"give every row a word, a whole number or a boolean, or set {self.field}"
        return DataError(f"column {self.name!r} holds {found}, which is no label", where=where, remedy=remedy)


Column = TextColumn | LabelColumn


def unknown_column(column: Column, columns: list[str], where: str) -> DataError:
    remedy = f"set {column.field} to one of: {', '.join(columns)}"
    return DataError(f"no column {column.name!r}", where=where, remedy=remedy)


def _kind_of(column: Column, schema: Any, where: str) -> Any:
    import pyarrow.types as kinds

    if column.name not in schema.names:
        raise unknown_column(column, schema.names, where)
    kind = schema.field(column.name).type
    return kind.value_type if kinds.is_dictionary(kind) else kind


def _is_text(kinds: Any, kind: Any) -> bool:
    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)


def _plain(column: Any) -> Any:
    import pyarrow as pa

    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
