import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco_ray.data.tokenizers import (
    END_OF_TEXT,
    build_tokenizer,
    encoder,
    load_tokenizer,
    tokenizer_files,
    tokenizer_from_files,
    vocab_size,
)
from diloco_ray.errors import DataError


@pytest.fixture(scope="module")
def byte_tokenizer():
    return tokenizer_from_files(tokenizer_files(build_tokenizer("bytes", list)))


@given(text=st.text())
def test_the_byte_tokenizer_of_transformers_gives_the_bytes(byte_tokenizer, text):
    tokens = byte_tokenizer(text)["input_ids"]
    assert bytes(tokens) == text.encode()
    assert byte_tokenizer.decode(tokens) == text


def test_the_letter_of_the_end_token_is_text_like_any_other(byte_tokenizer):
    assert bytes(byte_tokenizer("Ārija").input_ids) == "Ārija".encode()
    assert (byte_tokenizer.eos_token_id, len(byte_tokenizer), vocab_size(byte_tokenizer)) == (0, 256, 256)
    assert byte_tokenizer.decode([104, 105, 0], skip_special_tokens=True) == "hi"


@given(documents=st.lists(st.binary(min_size=1), max_size=5))
def test_bytes_are_encoded_without_the_tokenizer(byte_tokenizer, documents):
    encode = encoder("bytes", byte_tokenizer, np.dtype("u1"))
    assert [tokens.tobytes() for tokens in encode(documents)] == documents


def test_text_that_spells_the_end_token_is_only_text():
    tokenizer = build_tokenizer("train:300", lambda: [b"a common story " * 20])
    encode = encoder("train:300", tokenizer, np.dtype("<u2"))
    (tokens,) = encode([f"one{END_OF_TEXT}two".encode()])
    assert tokenizer.eos_token_id not in tokens
    assert tokenizer.decode(tokens) == f"one{END_OF_TEXT}two"


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    tokenizer = build_tokenizer("bytes", list)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no eos token"):
        load_tokenizer(tmp_path)
