import os

os.environ["HF_HUB_OFFLINE"] = "1"

import random

import pytest

SPELLED_END = "<|endoftext|>"
WORDS = ["the", "of", "training", "island", "round", "gradient", "learns", "météo", "Ā", "数据", "\t", SPELLED_END]


def make_documents(number: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["\n".join(" ".join(rng.choices(WORDS, k=12)) for _ in range(rng.randint(1, 20))) for _ in range(number)]


def speaker(number: int) -> str:
    """Uneven: about one in five is by B."""
    return "B" if number % 5 == 3 else "A"


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(400)


@pytest.fixture(scope="session")
def corpus(documents, tmp_path_factory) -> str:
    """A parquet file in a folder with a space in its name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path_factory.mktemp("a corpus") / "speeches.parquet"
    columns = {"year": list(range(len(documents))), "text": documents, "speaker": [speaker(n) for n in range(400)]}
    table = pa.table(columns)
    pq.write_table(table, path, row_group_size=64)
    return str(path)
