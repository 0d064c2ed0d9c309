"""Where documents come from: Python's own source, files on any fsspec path, or a Hugging Face dataset.

A document is UTF-8 bytes; an empty or null row is an empty document. Order is fixed: sorted file names, then rows.
This module does not know about tokens.
"""

import itertools
import json
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from diloco_ray.data.settings import DataSettings
from diloco_ray.errors import DataError
from diloco_ray.ids import canonical_json, sha256_hex

FEW_DOCUMENTS = 100  # below, documents are cut into pieces, so that a single file has a validation part
PIECE_BYTES = 4096

_KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "txt"}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """`documents()` starts from the first each time; `description` changes when the source is seen to change."""

    description: dict[str, Any]
    num_documents: int | None
    documents: Callable[[], Iterator[bytes]]


def open_corpus(settings: DataSettings) -> Corpus:
    """The corpus that a recipe names, cut to max_documents. DataError where it cannot be found or holds no text."""
    corpus = _source(settings)
    limit = settings.max_documents
    first = list(itertools.islice(corpus.documents(), min(FEW_DOCUMENTS, limit or FEW_DOCUMENTS)))
    if not any(first):
        remedy = "name a file, folder or dataset with text in it"
        raise DataError(f"corpus {settings.corpus!r} holds no text", where="data.corpus", remedy=remedy)
    if len(first) < FEW_DOCUMENTS:
        pieces = [piece for document in first for piece in cut(document)]
        return Corpus(corpus.description, len(pieces), lambda: iter(pieces))
    known = corpus.num_documents
    num_documents = limit if known is None else min(known, limit or known)
    return Corpus(corpus.description, num_documents, lambda: itertools.islice(corpus.documents(), limit))


def cut(document: bytes) -> list[bytes]:
    """Pieces of at most PIECE_BYTES that end at line ends where they can, and never inside a character."""
    pieces, start = [], 0
    while len(document) - start > PIECE_BYTES:
        stop = document.rfind(b"\n", start, start + PIECE_BYTES) + 1
        if stop <= start:
            stop = start + PIECE_BYTES
            while stop > start + PIECE_BYTES - 4 and document[stop] & 0xC0 == 0x80:
                stop -= 1
        pieces.append(document[start:stop])
        start = stop
    pieces.append(document[start:])
    return pieces


def _source(settings: DataSettings) -> Corpus:
    name = settings.corpus
    if name == "stdlib":
        return _stdlib()
    try:
        fs, path = fsspec.url_to_fs(name)
        found = fs.exists(path)
    except (OSError, ValueError, ImportError) as error:
        remedy = "check the address, the credentials, and that the package for this kind of storage is installed"
        raise DataError(f"{name!r} cannot be reached: {error}", where="data.corpus", remedy=remedy) from error
    if found or "://" in name or name.startswith(("/", ".", "~")) or set(name) & set("*?[") or _kind(name):
        return _files(fs, path, found, settings)
    return _dataset(settings)


def _stdlib() -> Corpus:
    root = sysconfig.get_path("stdlib")
    found: list[tuple[str, Path]] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]  # not walked into: they can be large
        paths = [Path(folder) / name for name in names if name.endswith(".py")]
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    found.sort()
    sizes = [(name, path.stat().st_size) for name, path in found]
    version = ".".join(map(str, sys.version_info[:3]))
    description = {"kind": "stdlib", "python": version, **_summary(sizes)}
    return Corpus(description, len(found), lambda: (path.read_bytes() for _, path in found))


def _files(fs: Any, path: str, found: bool, settings: DataSettings) -> Corpus:
    if found and not fs.isdir(path):
        readable = {path: _kind(path) or "txt"}  # named outright it is text, whatever its name
    else:
        names = fs.find(path) if found else [name for name in fs.glob(path) if not fs.isdir(name)]
        visible = [name for name in sorted(names) if not _hidden(name.removeprefix(path) if found else Path(name).name)]
        readable = {name: kind for name in visible if (kind := _kind(name))}
    if not readable:
        what = f"no parquet, jsonl or txt file at {settings.corpus!r}"
        remedy = "check the path for a typing error; relative paths start in the working folder"
        raise DataError(what, where=path, remedy=remedy)
    kinds = Counter(readable.values())
    if len(kinds) > 1:
        counts = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        remedy = f"choose one kind with a glob such as {settings.corpus.rstrip('/')}/*.{min(kinds)}"
        raise DataError(f"several kinds of files ({counts})", where=path, remedy=remedy)
    (kind,) = kinds
    files, column = list(readable), settings.text_column
    sizes = [(name, int(fs.size(name) or 0)) for name in files]
    description = {"kind": kind, **_summary(sizes)}
    match kind:
        case "parquet":
            num_documents = sum(_parquet_rows(fs, file, column) for file in files)
            return Corpus(description, num_documents, lambda: _each(files, lambda file: _parquet(fs, file, column)))
        case "jsonl":
            return Corpus(description, None, lambda: _each(files, lambda file: _jsonl(fs, file, column)))
        case _:
            return Corpus(description, len(files), lambda: _each(files, lambda file: _txt(fs, file)))


def _dataset(settings: DataSettings) -> Corpus:
    import datasets

    name = settings.corpus
    try:
        dataset = datasets.load_dataset(name, settings.subset, split=settings.split)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        remedy = "check data.corpus, data.subset and data.split; a file or folder can be named instead"
        what = f"neither a file nor a dataset that can be loaded: {name!r} ({type(error).__name__}: {error})"
        raise DataError(what, where="data.corpus", remedy=remedy) from error
    assert isinstance(dataset, datasets.Dataset)
    schema = dataset.features.arrow_schema
    _check_column(schema, settings.text_column, name)
    tables = dataset.select_columns([settings.text_column]).with_format("arrow")
    fingerprint = getattr(dataset, "_fingerprint", "")
    description = {"kind": "dataset", "num_documents": dataset.num_rows, "fingerprint": str(fingerprint)}

    def documents() -> Iterator[bytes]:
        for table in tables.iter(batch_size=1000):
            yield from _texts(table.column(0))  # type: ignore[union-attr]

    return Corpus(description, dataset.num_rows, documents)


def _parquet_rows(fs: Any, file: str, column: str) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with fs.open(file, "rb") as stream, pq.ParquetFile(stream) as parquet:
            _check_column(parquet.schema_arrow, column, file)
            return parquet.metadata.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"not a parquet file: {error}", where=file, remedy="replace or remove the file") from error


def _parquet(fs: Any, file: str, column: str) -> Iterator[bytes]:
    import pyarrow.parquet as pq

    with fs.open(file, "rb") as stream, pq.ParquetFile(stream) as parquet:
        for batch in parquet.iter_batches(batch_size=1000, columns=[column]):
            yield from _texts(batch.column(0))


def _jsonl(fs: Any, file: str, column: str) -> Iterator[bytes]:
    with fs.open(file, "rb", compression="infer") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"not JSON: {error}", where=where, remedy="write one JSON object per line") from error
            if not isinstance(row, dict):
                raise DataError("not a JSON object", where=where, remedy="write one JSON object per line")
            if column not in row:
                raise _unknown_column(column, list(row), where)
            text = row[column]
            if text is not None and not isinstance(text, str):
                raise DataError(f"{column!r} is {text!r:.60}, not text", where=where, remedy="set data.text_column")
            # A lone surrogate, which JSON can spell, has no UTF-8.
            yield (text or "").encode("utf-8", "replace")


def _txt(fs: Any, file: str) -> Iterator[bytes]:
    with fs.open(file, "rb", compression="infer") as stream:
        yield stream.read()


def _each(files: list[str], read: Callable[[str], Iterator[bytes]]) -> Iterator[bytes]:
    return itertools.chain.from_iterable(map(read, files))


def _texts(column: Any) -> Iterator[bytes]:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return (text or b"" for text in column.cast(pa.large_binary()).to_pylist())


def _check_column(schema: Any, column: str, where: str) -> None:
    import pyarrow.types as kinds

    if column not in schema.names:
        raise _unknown_column(column, schema.names, where)
    kind = schema.field(column).type
    if kinds.is_dictionary(kind):
        kind = kind.value_type
    if not (kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)):
        raise DataError(f"column {column!r} holds {kind}, not text", where=where, remedy="set data.text_column")


def _unknown_column(column: str, columns: list[str], where: str) -> DataError:
    remedy = f"set data.text_column to one of: {', '.join(columns)}"
    return DataError(f"no column {column!r}", where=where, remedy=remedy)


def _kind(name: str) -> str | None:
    path = Path(name)
    suffix = Path(path.stem).suffix if path.suffix in _COMPRESSIONS else path.suffix
    return _KINDS.get(suffix)


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in Path(name).parts)


def _summary(sizes: list[tuple[str, int]]) -> dict[str, Any]:
    listing = canonical_json({"files": [[Path(name).name, size] for name, size in sizes]})
    return {"num_files": len(sizes), "num_bytes": sum(size for _, size in sizes), "listing": sha256_hex(listing)}
