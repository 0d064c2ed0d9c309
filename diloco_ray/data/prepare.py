"""Corpus to packed token shards: every document's tokens, then the end-of-document token, one after the other.

The result depends on the settings and the corpus alone, byte for byte (with shards=cluster, on one kind of machine).
Each group of the train split, and the validation split as a whole, has token shards of its own. Work goes in parts: a
part is the next documents until one of these has TOKENS_PER_SHARD tokens, and becomes one token shard of each. After
each part a sealed journal is replaced, so an interrupted prepare goes on behind the last whole part; manifest.json is
written last.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, repeat
from typing import Any

import numpy as np

from diloco_ray.data.corpus import PIECE_BYTES, Corpus, open_corpus
from diloco_ray.data.groups import CENTRES, Groups, find_groups, groups_again
from diloco_ray.data.manifest import (
    MANIFEST,
    TOKENIZER,
    Group,
    Manifest,
    PreparedFolder,
    Split,
    StoredFile,
    seal,
    unseal,
)
from diloco_ray.data.settings import DataSettings
from diloco_ray.data.tokenizers import (
    Encode,
    build_tokenizer,
    encoder,
    tokenizer_files,
    tokenizer_from_files,
    vocab_size,
)
from diloco_ray.errors import CorruptionError, DataError
from diloco_ray.ids import canonical_json, sha256_hex

TOKENS_PER_SHARD = 16 * 1024 * 1024
BATCH_BYTES = 4 * 1024 * 1024
SMALL_CORPUS = 10_000  # documents; up to here they are hashed once more beforehand, so that one is surely held out

JOURNAL = "journal.json"

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class _Done:
    """How far a prepare has come. num_read counts documents of the corpus, empty ones too."""

    num_read: int
    num_parts: int
    splits: dict[str, Split]
    files: dict[str, StoredFile]


@dataclass
class _Part:
    """Tokens that wait to become a token shard of each group, by split and group."""

    num_documents: Counter[tuple[str, int]] = field(default_factory=Counter)
    num_tokens: Counter[tuple[str, int]] = field(default_factory=Counter)
    tokens: defaultdict[tuple[str, int], list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))


def prepare(settings: DataSettings, to: str, *, progress: Progress | None = None) -> Manifest:
    """Prepares into the folder `to` (any fsspec path), or returns what already lies there for the same settings.

    progress(documents done, documents in all or None) is called after each batch. DataError: a corpus, column or
    tokenizer that is not there, no text, no validation part, or a folder with data of other settings.
    """
    folder = PreparedFolder(to)
    finished = folder.manifest()
    if finished is not None:
        _same_settings(finished, settings, folder)
        return finished
    corpus = open_corpus(settings)
    limit = validation_limit(corpus, settings.validation_fraction)
    done = _taken_up(folder, settings, corpus)
    if done is None:
        tokenizer = build_tokenizer(settings.tokenizer, lambda: _train_documents(corpus, limit))
        groups = find_groups(settings, corpus, place, limit)
        texts = {f"{TOKENIZER}{name}": data for name, data in tokenizer_files(tokenizer).items()}
        files = {name: folder.write(name, data) for name, data in {**texts, **groups.files}.items()}
        splits = {"train": Split(tuple(map(Group, groups.names))), "validation": Split((Group("all"),))}
        done = _Done(0, 0, splits, files)
        _note(folder, settings, corpus, done)
    else:
        tokenizer = tokenizer_from_files(_read_tokenizer(folder, done))
        names = [group.name for group in done.splits["train"].groups]
        groups = groups_again(settings, names, {name: folder.read(name) or b"" for name in {CENTRES} & {*done.files}})
    num_tokens = vocab_size(tokenizer)
    eos_token_id = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    dtype = smallest_dtype(num_tokens)
    encode = encoder(settings.tokenizer, tokenizer, dtype)

    part, num_read = _Part(), done.num_read
    labels = corpus.labels() if corpus.labels else repeat("")
    for rows in _batches(islice(zip(corpus.documents(), labels), num_read, None)):
        _add(part, rows, groups, encode, np.array([eos_token_id], dtype), limit)
        num_read += len(rows)
        if max(part.num_tokens.values(), default=0) >= TOKENS_PER_SHARD:
            done = _write(folder, part, replace(done, num_read=num_read))
            _note(folder, settings, corpus, done)
            part = _Part()
        if progress:
            progress(num_read, corpus.num_documents)
    done = _write(folder, part, replace(done, num_read=num_read))
    _all_hold_text(done, settings)
    manifest = Manifest(
        settings=settings.content(),
        corpus={**corpus.description, "num_documents": num_read},
        tokenizer_digest=_tokenizer_digest(done),
        vocab_size=num_tokens,
        eos_token_id=eos_token_id,
        dtype=dtype.str,
        splits=done.splits,
        files=done.files,
    )
    folder.write(MANIFEST, manifest.to_bytes())
    folder.delete(JOURNAL)
    return manifest


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Unsigned and little-endian, wide enough for ids 0 .. vocab_size - 1."""
    return np.dtype("u1" if vocab_size <= 2**8 else "<u2" if vocab_size <= 2**16 else "<u4")


def place(document: bytes) -> int:
    """Where a document falls among 0 .. 2**64 - 1, by its sha256 alone: the same in every run and for every copy."""
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big")


def validation_limit(corpus: Corpus, fraction: float) -> int:
    """Documents below it are held out: that fraction of them, and of a small corpus at least the lowest one."""
    limit = int(fraction * 2**64)
    if corpus.num_documents is None or corpus.num_documents > SMALL_CORPUS:
        return limit
    return max(limit, min((place(document) for document in corpus.documents() if document), default=0) + 1)


def _train_documents(corpus: Corpus, limit: int) -> Iterator[bytes]:
    return (document for document in corpus.documents() if place(document) >= limit)


def _batches(rows: Iterable[tuple[bytes, str]]) -> Iterator[list[tuple[bytes, str]]]:
    batch, num_bytes = [], 0
    for row in rows:
        batch.append(row)
        num_bytes += len(row[0])
        if num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _add(
    part: _Part, rows: list[tuple[bytes, str]], groups: Groups, encode: Encode, end: np.ndarray, limit: int
) -> None:
    """rows: documents with their labels."""
    documents = [document for document, _ in rows if document]
    held_out = [place(document) < limit for document in documents]
    labels = [label for document, label in rows if document]
    trained = [number for number, out in enumerate(held_out) if not out]
    of_train = iter(groups.of([documents[n] for n in trained], [labels[n] for n in trained]))
    for tokens, out in zip(encode(documents), held_out):
        key = ("validation", 0) if out else ("train", next(of_train))
        part.tokens[key] += (tokens, end)
        part.num_tokens[key] += len(tokens) + 1
        part.num_documents[key] += 1


def _write(folder: PreparedFolder, part: _Part, done: _Done) -> _Done:
    """The part as one more token shard of each group that it has documents of."""
    splits, files = dict(done.splits), dict(done.files)
    for key in sorted(part.tokens):
        name, number = key
        groups = list(splits[name].groups)
        stem = f"{name}-{number}" if len(groups) > 1 else name
        shard = f"{stem}-{done.num_parts:05d}.bin"
        files[shard] = folder.write(shard, np.concatenate(part.tokens[key]).tobytes())
        before = groups[number]
        groups[number] = Group(
            before.name,
            before.num_documents + part.num_documents[key],
            before.num_tokens + part.num_tokens[key],
            (*before.shards, shard),
        )
        splits[name] = Split(tuple(groups))
    return replace(done, num_parts=done.num_parts + 1, splits=splits, files=files)


def _identity(settings: DataSettings, corpus: Corpus) -> dict[str, Any]:
    sizes = {"tokens_per_shard": TOKENS_PER_SHARD, "batch_bytes": BATCH_BYTES}
    return {"settings": settings.content(), "corpus": corpus.description, **sizes}


def _note(folder: PreparedFolder, settings: DataSettings, corpus: Corpus, done: _Done) -> None:
    folder.write(JOURNAL, seal({"identity": _identity(settings, corpus), "done": asdict(done)}))


def _taken_up(folder: PreparedFolder, settings: DataSettings, corpus: Corpus) -> _Done | None:
    """Where an earlier prepare of the same corpus stopped; None, and its shards deleted, where it cannot be used."""
    data = folder.read(JOURNAL)
    if data is None:
        return None
    try:
        body = unseal(data, folder.url_of(JOURNAL))
        entry = body["done"]
        splits = {name: Split.from_dict(split) for name, split in entry["splits"].items()}
        files = {name: StoredFile(**file) for name, file in entry["files"].items()}
        done = _Done(entry["num_read"], entry["num_parts"], splits, files)
    except (CorruptionError, KeyError, TypeError):
        return None
    sizes = folder.sizes()
    whole = all(sizes.get(name) == file.num_bytes for name, file in files.items())
    if whole and body["identity"] == _identity(settings, corpus):
        return done
    for name in files:
        folder.delete(name)
    return None


def _read_tokenizer(folder: PreparedFolder, done: _Done) -> dict[str, bytes]:
    names = [name for name in done.files if name.startswith(TOKENIZER)]
    return {name.removeprefix(TOKENIZER): folder.read(name) or b"" for name in names}


def _tokenizer_digest(done: _Done) -> str:
    return sha256_hex(
        canonical_json({name: file.sha256 for name, file in done.files.items() if name.startswith(TOKENIZER)})
    )


def _same_settings(manifest: Manifest, settings: DataSettings, folder: PreparedFolder) -> None:
    old, new = manifest.settings, settings.content()
    differences = [f"{key}: {old.get(key)!r} -> {new[key]!r}" for key in new if old.get(key) != new[key]]
    if differences:
        what = f"the folder holds data of other settings: {'; '.join(differences)}"
        raise DataError(what, where=folder.url, remedy="choose another data.prepared, or delete this folder")


def _all_hold_text(done: _Done, settings: DataSettings) -> None:
    counts = {name: split.num_documents for name, split in done.splits.items()}
    for name, number in counts.items():
        if not number:
            what = f"none of {sum(counts.values())} documents fell into the {name} part"
            what += f" with validation_fraction={settings.validation_fraction:g}"
            change = "larger" if name == "validation" else "smaller"
            remedy = f"give more text, or choose a {change} data.validation_fraction"
            if sum(counts.values()) < 2:
                remedy = f"give more text: the parts share no document, and one of up to {PIECE_BYTES} bytes is not cut"
            raise DataError(what, where="data.validation_fraction", remedy=remedy)
    for group in done.splits["train"].groups:
        if not group.num_documents:
            what = f"no training document fell into {group.name}"
            raise DataError(what, where="data.shards", remedy="choose fewer data.clusters, or give more text")
