"""The two front doors of one engine: real processes on Ray, and one process without it."""

from pathlib import Path
from typing import Any

import pytest

from tests.processes import assert_whole, run_folder, training, uninterrupted, write_recipe


@pytest.mark.ray
@pytest.mark.parametrize("fragments", [1, 2])
def test_a_run_on_ray_equals_the_in_process_run_of_the_same_seeds_bit_for_bit(
    tiny: dict[str, Any], tmp_path: Path, fragments: int
) -> None:
    recipe = {**tiny, "sync": {"fragments": fragments, "uplink": "int4", "downlink": "int8"}}
    expected = uninterrupted(recipe)
    with training(write_recipe(tmp_path, recipe), run_folder(recipe)) as train:
        output = train.wait_for_end()
    assert_whole(run_folder(recipe), expected)
    assert len([line for line in output.splitlines() if line.startswith("round ")]) == recipe["rounds"]
