"""Where documents come from: Python's own source, files on any fsspec path, or a Hugging Face dataset.

A document is UTF-8 bytes; an empty or null row is an empty document. Order is fixed: sorted file names, then rows.
Labels are another column of the same rows, read beside them. This module does not know about tokens.
"""

import itertools
import json
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from diloco_ray.data.columns import Column, LabelColumn, TextColumn, unknown_column
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
    """`documents()` starts from the first each time; `description` changes when the source is seen to change.

    `labels()`: one for each document, in the same order; None where no label column was asked for.
    """

    description: dict[str, Any]
    num_documents: int | None
    documents: Callable[[], Iterator[bytes]]
    labels: Callable[[], Iterator[str]] | None = None


def open_corpus(settings: DataSettings) -> Corpus:
    """The corpus that a recipe names, cut to max_documents. DataError where it cannot be found or holds no text."""
    corpus = _source(settings)
    labels, limit = corpus.labels, settings.max_documents
    first = list(itertools.islice(corpus.documents(), min(FEW_DOCUMENTS, limit or FEW_DOCUMENTS)))
    if not any(first):
        remedy = "name a file, folder or dataset with text in it"
        raise DataError(f"corpus {settings.corpus!r} holds no text", where="data.corpus", remedy=remedy)
    if len(first) < FEW_DOCUMENTS:
        cuts = [cut(document) for document in first]
        pieces = [piece for pieces in cuts for piece in pieces]
        repeated = [label for label, pieces in zip(labels(), cuts) for _ in pieces] if labels else []
        return Corpus(corpus.description, len(pieces), lambda: iter(pieces), labels and (lambda: iter(repeated)))
    known = corpus.num_documents
    num_documents = limit if known is None else min(known, limit or known)
    return Corpus(
        corpus.description,
        num_documents,
        lambda: itertools.islice(corpus.documents(), limit),
        labels and (lambda: itertools.islice(labels(), limit)),
    )


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
        if settings.shards == "label":
            raise _no_columns(name)
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
    files, (text, label) = list(readable), _columns(settings)
    sizes = [(name, int(fs.size(name) or 0)) for name in files]
    description = {"kind": kind, **_summary(sizes)}
    match kind:
        case "parquet":
            num_documents = sum(_parquet_rows(fs, file, [text, label] if label else [text]) for file in files)
            read = _parquet
        case "jsonl":
            num_documents = None
            read = _jsonl
        case _:
            if label:
                raise _no_columns(path)
            return Corpus(description, len(files), lambda: _each(files, lambda file: _txt(fs, file)))
    return Corpus(
        description,
        num_documents,
        lambda: _each(files, lambda file: read(fs, file, text)),
        label and (lambda: _each(files, lambda file: read(fs, file, label))),
    )


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
    text, label = _columns(settings)
    for column in [text, label] if label else [text]:
        column.check(dataset.features.arrow_schema, name)
    fingerprint = getattr(dataset, "_fingerprint", "")
    description = {"kind": "dataset", "num_documents": dataset.num_rows, "fingerprint": str(fingerprint)}

    def read(column: Column) -> Iterator[Any]:
        for table in dataset.select_columns([column.name]).with_format("arrow").iter(batch_size=1000):
            yield from column.of_arrow(table.column(0), name)  # type: ignore[union-attr]

    return Corpus(description, dataset.num_rows, lambda: read(text), label and (lambda: read(label)))


def _columns(settings: DataSettings) -> tuple[TextColumn, LabelColumn | None]:
    label = LabelColumn(settings.label_column or "") if settings.shards == "label" else None
    return TextColumn(settings.text_column), label


def _no_columns(where: str) -> DataError:
    remedy = "give parquet, jsonl or a dataset with data.label_column in it, or choose data.shards=cluster"
    return DataError("plain text has no columns to take labels from", where=where, remedy=remedy)


def _parquet_rows(fs: Any, file: str, columns: Iterable[Column]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with fs.open(file, "rb") as stream, pq.ParquetFile(stream) as parquet:
            for column in columns:
                column.check(parquet.schema_arrow, file)
            return parquet.metadata.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"not a parquet file: {error}", where=file, remedy="replace or remove the file") from error


def _parquet(fs: Any, file: str, column: Column) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with fs.open(file, "rb") as stream, pq.ParquetFile(stream) as parquet:
        for batch in parquet.iter_batches(batch_size=1000, columns=[column.name]):
            yield from column.of_arrow(batch.column(0), file)


def _jsonl(fs: Any, file: str, column: Column) -> Iterator[Any]:
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
            if column.name not in row:
                raise unknown_column(column, list(row), where)
            yield column.of_json(row[column.name], where)


def _txt(fs: Any, file: str) -> Iterator[bytes]:
    with fs.open(file, "rb", compression="infer") as stream:
        yield stream.read()


def _each(files: list[str], read: Callable[[str], Iterator[Any]]) -> Iterator[Any]:
    return itertools.chain.from_iterable(map(read, files))


def _kind(name: str) -> str | None:
    path = Path(name)
    suffix = Path(path.stem).suffix if path.suffix in _COMPRESSIONS else path.suffix
    return _KINDS.get(suffix)


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in Path(name).parts)


def _summary(sizes: list[tuple[str, int]]) -> dict[str, Any]:
    listing = canonical_json({"files": [[Path(name).name, size] for name, size in sizes]})
    return {"num_files": len(sizes), "num_bytes": sum(size for _, size in sizes), "listing": sha256_hex(listing)}
