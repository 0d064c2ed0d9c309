"""The house: what may import what, and what a bare import costs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_importing_the_package_loads_neither_ray_nor_torch() -> None:
    assert not {"ray", "torch", "transformers", "datasets"} & loaded_by("import diloco_ray")


def test_the_command_lines_help_loads_neither_ray_nor_torch() -> None:
    assert not {"ray", "torch", "transformers"} & loaded_by("import diloco_ray.cli")


def test_an_engine_without_ray_never_loads_it() -> None:
    assert "ray" not in loaded_by("import diloco_ray.simulation.in_process")


def test_the_public_names_are_there() -> None:
    import diloco_ray

    assert {"DiLoCoTrainer", "Result", "RunConfig"} == set(diloco_ray.__all__)
    assert all(getattr(diloco_ray, name) for name in diloco_ray.__all__)


def test_no_module_outgrows_its_room() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "diloco_ray").rglob("*.py")}
    assert {str(path): length for path, length in lengths.items() if length > 300} == {}


def test_no_payload_is_ever_code() -> None:
    rooms = [ROOT / "diloco_ray" / room for room in ("transport", "log", "algorithm", "island", "coordinator")]
    texts = {path: path.read_text() for room in rooms for path in room.rglob("*.py")}
    words = r"import (pickle|zlib|gzip|zipfile|lzma|bz2|marshal)|torch\.load|\beval\(|\bexec\("
    assert {str(path): found for path, text in texts.items() if (found := re.findall(words, text))} == {}


def test_the_wall_clock_is_for_people_and_for_the_end_of_a_token() -> None:
    """What the protocol waits for is measured on a clock that cannot be set; the time of day is shown and no more."""
    texts = {path: path.read_text() for path in (ROOT / "diloco_ray").rglob("*.py")}
    asks = r"time\.(?:time|localtime|gmtime|ctime)\b|\bdatetime\b(?! import timedelta\n)|\bdate\.today"
    asking = {path.relative_to(ROOT / "diloco_ray").as_posix() for path, text in texts.items() if re.search(asks, text)}
    shown = {"coordinator/report.py", "observe/events.py", "observe/status.py"}  # `updated_at`, `time`
    named = {"runtime/chaos.py"}  # folders
    assert asking == {*shown, *named, "transport/tokens.py"}  # never an island's: the coordinator's own
