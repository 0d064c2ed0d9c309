import subprocess
import sys

import pytest
from pydantic import ValidationError

from diloco_ray.data.settings import DataSettings


def test_settings_bring_in_no_heavy_library():
    code = "import sys, diloco_ray.data.settings; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "transformers", "datasets", "pyarrow"} & set(loaded)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokenizer": "train:"},
        {"tokenizer": "train:256"},
        {"tokenizer": "train:many"},
        {"validation_fraction": 0},
        {"validation_fraction": 0.5},
        {"sequence_length": 1},
        {"corpus": ""},
        {"corpora": "x"},
        {"shards": "label"},
        {"shards": "cluster"},
        {"shards": "cluster", "clusters": 1},
        {"shards": "topic"},
    ],
)
def test_values_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(ValidationError):
        DataSettings(**wrong)


def test_content_leaves_out_what_does_not_change_the_shards():
    assert DataSettings(sequence_length=64, prepared="x").content() == DataSettings().content()
    assert DataSettings(max_documents=3).content() != DataSettings().content()


def test_content_leaves_out_groups_that_are_not_asked_for():
    both = {"label_column": "language", "clusters": 4}
    assert DataSettings(**both).content() == DataSettings().content()
    assert DataSettings(shards="label", **both).content()["clusters"] is None
    assert DataSettings(shards="cluster", **both).content() == DataSettings(shards="cluster", clusters=4).content()
