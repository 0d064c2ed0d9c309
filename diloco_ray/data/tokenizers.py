"""Tokenizers: 256 bytes, a byte-level BPE trained on the spot, or any that Hugging Face loads.

All three are kept as Hugging Face files and load with AutoTokenizer. The end-of-document token is the tokenizer's eos.
This module does not know where documents come from or where tokens go.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diloco_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 256 * 1024 * 1024  # merges of the most frequent pairs are settled long before

Encode = Callable[[list[bytes]], list[np.ndarray]]


def build_tokenizer(name: str, documents: Callable[[], Iterable[bytes]]) -> "PreTrainedTokenizerBase":
    """`documents` are read only to train ("train:4096"), up to TRAINING_BYTES of them. DataError for one not found."""
    if name == "bytes":
        return _bytes_tokenizer()
    if name.startswith("train:"):
        return _train_tokenizer(int(name.removeprefix("train:")), documents())
    return load_tokenizer(name)


def load_tokenizer(name: str | Path) -> "PreTrainedTokenizerBase":
    """From a local folder or by its Hugging Face name. DataError where there is none or it has no eos token."""
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else str(name))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        first = (str(error).splitlines() or [""])[0]
        remedy = "name bytes, train:4096, or a folder or Hugging Face repository that AutoTokenizer can load"
        raise DataError(
            f"tokenizer {str(name)!r} cannot be loaded: {first}", where="data.tokenizer", remedy=remedy
        ) from error
    if tokenizer.eos_token_id is None:
        remedy = "set its eos_token and save it again: documents are divided by it"
        raise DataError(f"tokenizer {str(name)!r} has no eos token", where="data.tokenizer", remedy=remedy)
    return tokenizer


def vocab_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """One more than the highest id, which is what an embedding needs."""
    return max(tokenizer.get_vocab().values()) + 1


def encoder(name: str, tokenizer: "PreTrainedTokenizerBase", dtype: np.dtype) -> Encode:
    """Documents to tokens, without special tokens: text that spells one is only text. May use several threads."""
    if name == "bytes":
        return lambda documents: [np.frombuffer(document, dtype) for document in documents]
    if not tokenizer.is_fast:
        return lambda documents: [np.array(_slow(tokenizer, document), dtype) for document in documents]
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()

    def encode(documents: list[bytes]) -> list[np.ndarray]:
        texts = [document.decode("utf-8", "replace") for document in documents]
        return [np.array(one.ids, dtype) for one in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


def tokenizer_files(tokenizer: "PreTrainedTokenizerBase") -> dict[str, bytes]:
    """What save_pretrained writes, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def tokenizer_from_files(files: Mapping[str, bytes]) -> "PreTrainedTokenizerBase":
    """The inverse of tokenizer_files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return load_tokenizer(folder)


def _bytes_tokenizer() -> "PreTrainedTokenizerBase":
    """Token id = byte value; byte 0, which no text holds, ends a document."""
    from tokenizers import models

    letters = _byte_letters()
    vocabulary = {letter: byte for byte, letter in enumerate(letters)}
    # The letter that stands for byte 0 is also a letter of Latvian: in text it must be taken apart.
    model = models.BPE(vocab=vocabulary, merges=[])
    return _byte_level(model, eos_token=letters[0], use_regex=False, split_special_tokens=True)


def _train_tokenizer(size: int, documents: Iterable[bytes]) -> "PreTrainedTokenizerBase":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=_byte_letters(),
        show_progress=False,
    )
    learner.train_from_iterator(_texts_to_learn(documents), trainer)
    return _byte_level(learner.model, eos_token=END_OF_TEXT, use_regex=True, split_special_tokens=False)


def _texts_to_learn(documents: Iterable[bytes]) -> Iterable[str]:
    num_bytes = 0
    for document in documents:
        yield document.decode("utf-8", "replace")
        num_bytes += len(document)
        if num_bytes >= TRAINING_BYTES:
            return


def _byte_level(
    model: Any, *, eos_token: str, use_regex: bool, split_special_tokens: bool
) -> "PreTrainedTokenizerBase":
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos_token,
        clean_up_tokenization_spaces=False,
        split_special_tokens=split_special_tokens,
    )


def _byte_letters() -> list[str]:
    """The printable character that stands for each byte in GPT-2's byte-level vocabulary, by byte."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return [chr(byte if byte in kept else next(moved)) for byte in range(256)]


def _slow(tokenizer: "PreTrainedTokenizerBase", document: bytes) -> list[int]:
    text = document.decode("utf-8", "replace")
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
