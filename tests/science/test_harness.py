"""The science benchmark's own arithmetic: pairs, verdicts, the table, and which rows a command means."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.science.__main__ import main
from benchmarks.science.claims import CORE, MORE, Claim, Row, better, chosen, find, shown, unclaimed
from benchmarks.science.report import draw, runs_table, table
from benchmarks.science.runs import Corpus, Laboratory, Outcome
from benchmarks.science.variants import RECIPE, VARIANTS
from diloco_ray.config import RunConfig

CLAIMS = [claim for row in (*CORE, *MORE) for claim in row.claims]
CLAIM = Claim("FedAvg", "DiLoCo", at_least=1)


def test_seeds_are_paired() -> None:
    finding = find(CLAIM, [1.02, 2.06], [1.0, 2.0])
    assert finding.percents == pytest.approx((2.0, 3.0))
    assert finding.mean == pytest.approx(2.5)
    assert finding.observed == "+2.50 % (+2.00 .. +3.00)"


def test_a_variant_with_fewer_seeds_is_paired_with_the_first_ones() -> None:
    assert find(CLAIM, [1.02], [1.0, 2.0]).percents == pytest.approx((2.0,))


@pytest.mark.parametrize(
    ("claim", "percent", "verdict", "fails"),
    [
        (CLAIM, 1.5, "holds", False),
        (CLAIM, 0.5, "does not hold", True),
        (Claim("int8", "DiLoCo", -0.4, 0.4), -0.5, "does not hold", True),
        (better("30 % dropped", "one worker"), -0.1, "does not hold", True),  # a tie is not better
        (shown(CLAIM), 0.5, "does not hold", False),
        (unclaimed("one island", "one worker"), 5.0, "not claimed at this size", False),
    ],
)
def test_only_an_asserted_claim_outside_its_bounds_fails(
    claim: Claim, percent: float, verdict: str, fails: bool
) -> None:
    finding = find(claim, [1 + percent / 100], [1.0])
    assert (finding.verdict, finding.fails) == (verdict, fails)


def test_thresholds_read_as_the_table_has_them() -> None:
    both, between = Claim("int8", "DiLoCo", -0.4, 0.4), Claim("DiLoCo", "one worker", 1, 7)
    thresholds = [claim.threshold for claim in (CLAIM, both, between, unclaimed("one island", "one worker"))]
    assert thresholds == [">= +1 %", "within 0.4 %", ">= +1 % and <= +7 %", "none"]


def test_the_command_means_core_rows_all_rows_or_those_named() -> None:
    assert chosen("core") == CORE
    assert chosen("all") == (*CORE, *MORE)
    assert [row.name for row in chosen("all", ["muon", "H"])] == ["H", "muon"]


@pytest.mark.parametrize("option", ["--seeds", "--workers"])
def test_none_at_all_is_refused(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["science", option, "0"])
    with pytest.raises(SystemExit):
        main()
    assert "give 1 or more" in capsys.readouterr().err


def test_names_of_rows_differ() -> None:
    names = [row.name for row in (*CORE, *MORE)]
    assert len(set(names)) == len(names)


def test_every_variant_is_in_a_claim_and_every_claim_has_its_variants() -> None:
    assert {variant.name for claim in CLAIMS for variant in claim.variants} == set(VARIANTS)


def test_a_row_without_labels_says_that_it_was_skipped() -> None:
    row = Row("non-iid", "no difference", (Claim("a label per island", "DiLoCo", 1, 7),))
    assert row.claims[0].needs_labels
    assert "skipped: needs --label-column" in table([(row, None)])


def test_a_failed_claim_stands_out() -> None:
    row = Row("fedavg", "Nesterov", (CLAIM,))
    assert "**does not hold**" in table([(row, find(CLAIM, [1.0], [1.0]))])


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_the_engine_knows_every_field_of_a_variant(variant) -> None:
    RunConfig.from_yaml(RECIPE, [field.format(label_column="label") for field in variant.fields])


def test_a_folder_is_named_after_all_that_decides_the_result(tmp_path: Path) -> None:
    laboratory = Laboratory(Corpus("text.parquet"), str(tmp_path))
    diloco, single = VARIANTS["DiLoCo"], VARIANTS["one worker"]
    name = laboratory.config(diloco, 0).name
    assert name.startswith("diloco-seed0-")
    assert laboratory.config(diloco, 0).name == name
    same_recipe = laboratory.config(replace(diloco, name="DiLoCo on Ray"), 0).name
    assert same_recipe.rpartition("-")[2] == name.rpartition("-")[2]
    others = [laboratory.config(diloco, 1), laboratory.config(single, 0)]
    others.append(replace(laboratory, corpus=Corpus("other.parquet")).config(diloco, 0))
    others.append(replace(laboratory, corpus=Corpus("text.parquet", label_column="label")).config(diloco, 0))
    assert len({name.rpartition("-")[2], *(config.name.rpartition("-")[2] for config in others)}) == 5


def test_the_page_has_its_runs_and_a_small_figure(tmp_path: Path) -> None:
    outcome = Outcome([0, 1_000_000, 2_000_000], [3.0, 2.0, 1.5], 25.0, 1.0)
    outcomes = {name: [outcome, outcome] for name in ("one worker", "data parallel", "DiLoCo", "H = 100", "k = 8")}
    assert "| k = 8 | `islands=8` | 1.5000, 1.5000 | 2.00 | 25 x |" in runs_table(outcomes)
    draw(outcomes, tmp_path / "curves.svg")
    first = (tmp_path / "curves.svg").read_bytes()
    draw(outcomes, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_bytes() == first
    assert len(first) < 150_000
