import gzip
import json

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco_ray.data.corpus import FEW_DOCUMENTS, PIECE_BYTES, cut, open_corpus
from diloco_ray.data.settings import DataSettings
from diloco_ray.errors import DataError
from tests.data.conftest import speaker


def read(path, **fields) -> list[bytes]:
    return list(open_corpus(DataSettings(corpus=str(path), **fields)).documents())


def test_the_standard_library_is_sorted_source_without_its_tests():
    corpus = open_corpus(DataSettings())
    documents = list(corpus.documents())
    assert len(documents) == corpus.num_documents > FEW_DOCUMENTS
    assert any(b"class OrderedDict" in document for document in documents)
    assert not any(document.startswith(b"# Python test set -- part 1") for document in documents)
    assert documents == list(corpus.documents())


def test_parquet_jsonl_and_gzip_give_the_same_documents(documents, corpus, tmp_path):
    expected = [text.encode() for text in documents]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    (tmp_path / "plain.jsonl").write_bytes(lines)
    (tmp_path / "small.jsonl.gz").write_bytes(gzip.compress(lines))
    assert read(corpus) == expected
    assert read(tmp_path / "plain.jsonl") == expected
    assert read(tmp_path / "small.jsonl.gz") == expected
    assert read(corpus, max_documents=150) == expected[:150]


def test_a_folder_and_a_glob_read_files_in_the_order_of_their_names(tmp_path):
    for number in range(120):
        (tmp_path / f"{number:03d}.txt").write_text(f"document {number}")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "LICENSE").write_text("no")
    expected = [f"document {number}".encode() for number in range(120)]
    assert read(tmp_path) == read(tmp_path / "*.txt") == expected


def test_a_relative_path_starts_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text("once upon a time")
    monkeypatch.chdir(tmp_path)
    assert read("book.txt") == [b"once upon a time"]


def test_files_lie_on_any_fsspec_path():
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/corpora/one.txt", b"far away")
    assert read("memory://corpora/one.txt") == read("memory://corpora") == [b"far away"]


def test_a_hugging_face_dataset_is_read_by_its_name(documents, monkeypatch):
    import datasets

    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_dict({"body": [*documents, None]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read("someone/speeches", subset="en", split="train[:1%]", text_column="body")
    assert found == [*(text.encode() for text in documents), b""]
    assert asked == [("someone/speeches", "en", "train[:1%]")]


def test_few_documents_are_cut_into_pieces_at_line_ends(tmp_path):
    text = "".join(f"line {number} of a long book\n" for number in range(3000))
    (tmp_path / "book.txt").write_text(text)
    corpus = open_corpus(DataSettings(corpus=str(tmp_path / "book.txt")))
    pieces = list(corpus.documents())
    assert b"".join(pieces) == text.encode()
    assert corpus.num_documents == len(pieces) > 10
    assert all(piece.endswith(b"\n") for piece in pieces)


@given(st.lists(st.tuples(st.sampled_from("aé数😀\n"), st.integers(1, 3000)), max_size=6))
def test_pieces_add_up_and_are_whole_characters(runs):
    text = "".join(letter * number for letter, number in runs)
    pieces = cut(text.encode())
    assert b"".join(pieces) == text.encode()
    assert all(len(piece) <= PIECE_BYTES for piece in pieces)
    assert "".join(piece.decode() for piece in pieces) == text


def test_bytes_that_are_not_text_are_still_cut():
    assert b"".join(cut(b"\x80" * 10000)) == b"\x80" * 10000


def problem(path, **fields) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **fields)
    assert caught.value.where
    assert caught.value.remedy
    return str(caught.value)


def test_what_is_wrong_with_a_corpus_is_said(corpus, tmp_path):
    def file(name: str, content: str):
        (tmp_path / name).write_text(content)
        return tmp_path / name

    assert "year, text, speaker" in problem(corpus, text_column="txt")
    assert "int64, not text" in problem(corpus, text_column="year")
    assert "no-such" in problem(tmp_path / "no-such.parquet")
    assert "no-such" in problem("nobody/no-such-dataset")
    assert "not a parquet file" in problem(file("bad.parquet", "x" * 50))
    assert "holds no text" in problem(file("empty.txt", ""))
    assert "line 2" in problem(file("bad.jsonl", '{"text": "a"}\n{"text": '))
    assert "set data.text_column to one of: body" in problem(file("other.jsonl", '{"body": "a"}\n'))
    assert "not a JSON object" in problem(file("array.jsonl", "[1]\n"))
    assert "holds 7, not text" in problem(file("number.jsonl", '{"text": 7}\n'))
    assert "several kinds" in problem(tmp_path)
    (tmp_path / "none").mkdir()
    assert "no parquet, jsonl or txt" in problem(tmp_path / "none")
    assert "cannot be reached" in problem("nosuchprotocol://bucket/x")


# ---- labels ----


def labels(path, **fields) -> list[str]:
    settings = DataSettings(corpus=str(path), shards="label", **{"label_column": "speaker", **fields})
    corpus = open_corpus(settings)
    assert corpus.labels is not None
    found = list(corpus.labels())
    assert len(found) == len(list(corpus.documents()))
    return found


def test_every_kind_of_rows_gives_the_same_labels(documents, corpus, tmp_path, monkeypatch):
    import datasets

    expected = [speaker(number) for number in range(len(documents))]
    rows = [{"text": text, "speaker": name, "by_a": name == "A"} for text, name in zip(documents, expected)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = datasets.Dataset.from_list(rows).class_encode_column("by_a")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: dataset)
    assert labels(corpus) == labels(tmp_path / "rows.jsonl") == labels("some/dataset") == expected
    assert labels(corpus, max_documents=150) == expected[:150]
    assert labels(corpus, label_column="year")[:3] == ["0", "1", "2"]
    assert set(labels(tmp_path / "rows.jsonl", label_column="by_a")) == {"true", "false"}
    assert set(labels("some/dataset", label_column="by_a")) == {"0", "1"}
    assert open_corpus(DataSettings(corpus=str(corpus), label_column="speaker")).labels is None


def test_the_pieces_of_a_document_have_its_label(tmp_path):
    rows = [{"text": "a line\n" * 2000, "speaker": "A"}, {"text": "short", "speaker": "B"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert labels(tmp_path / "rows.jsonl") == ["A"] * 4 + ["B"]


def test_what_is_wrong_with_labels_is_said(corpus, tmp_path):
    def label_problem(path, **fields) -> str:
        with pytest.raises(DataError) as caught:
            labels(path, **fields)
        return str(caught.value)

    assert "set data.label_column to one of: year, text, speaker" in label_problem(corpus, label_column="tongue")
    (tmp_path / "none.jsonl").write_text('{"text": "a", "speaker": null}\n')
    assert "holds None, which is no label" in label_problem(tmp_path / "none.jsonl")
    (tmp_path / "half.jsonl").write_text('{"text": "a", "speaker": 0.5}\n')
    assert "line 1" in label_problem(tmp_path / "half.jsonl")
    assert "one of: text, speaker" in label_problem(tmp_path / "half.jsonl", label_column="tongue")
    (tmp_path / "book.txt").write_text("once upon a time")
    assert "no columns" in label_problem(tmp_path / "book.txt")
    assert "no columns" in label_problem("stdlib")
