import subprocess
import sys

import pytest
from pydantic import ValidationError

from diloco_ray.model.settings import ModelSettings


def test_settings_bring_in_no_heavy_library():
    code = "import sys, diloco_ray.model.settings; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "transformers", "datasets", "pyarrow"} & set(loaded)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({}, "given: none"),
        ({"path": "gpt2", "factory": "a:b"}, "given: path, factory"),
        ({"config": {}}, "model_type"),
        ({"factory": "no colon"}, "factory"),
        ({"name": "x"}, "name"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(wrong, named):
    with pytest.raises(ValidationError, match=named):
        ModelSettings(**wrong)
