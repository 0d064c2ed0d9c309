"""The papers' claims at toy size, through the real engine.

    python -m benchmarks.science --claims core --seeds 3 --out docs/results/FILE.md
    python -m benchmarks.science --corpus TEXT.parquet --label-column language --only single non-iid

Exits with 1 where an asserted claim does not hold. Finished runs are kept in the folder --runs and not repeated.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

from benchmarks.science.claims import CORE, MORE, chosen, find
from benchmarks.science.corpus import CORPUS
from benchmarks.science.report import Findings, table, write_page
from benchmarks.science.runs import Corpus, Laboratory, carry_out, final_losses


def main() -> int:
    arguments = _arguments()
    if not Path(arguments.corpus).exists():
        print(f"no corpus at {arguments.corpus}: `make sotu-data` builds it, or name your own with --corpus")
        return 2
    began = time.monotonic()
    corpus = Corpus(arguments.corpus, arguments.text_column, arguments.label_column)
    claims = [(row, claim) for row in chosen(arguments.claims, arguments.only) for claim in row.claims]
    possible = [claim for _, claim in claims if corpus.label_column or not claim.needs_labels]
    names = dict.fromkeys(variant.name for claim in possible for variant in claim.variants)
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    outcomes = carry_out(Laboratory(corpus, arguments.runs), names, seeds, arguments.workers, say)
    findings: Findings = [
        (row, find(claim, *(final_losses(outcomes[v.name]) for v in claim.variants)) if claim in possible else None)
        for row, claim in claims
    ]
    print(table(findings))
    seconds = time.monotonic() - began
    if arguments.out:
        write_page(arguments.out, _command(arguments), findings, outcomes)
    failed = [finding.claim for _, finding in findings if finding and finding.fails]
    for claim in failed:
        print(f"does not hold: {claim.of} against {claim.against}, {claim.threshold}")
    print(f"{seconds / 60:.0f} minutes")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    rows = [row.name for row in (*CORE, *MORE)]
    parser = argparse.ArgumentParser(
        "python -m benchmarks.science", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--claims", choices=("core", "all"), default="core")
    parser.add_argument("--seeds", type=_count, default=3, metavar="N", help="how many")
    parser.add_argument("--first-seed", type=int, default=0, metavar="SEED", help="they are SEED, SEED + 1, ..")
    parser.add_argument("--corpus", default=str(CORPUS))
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", help="of the corpus; with it, the non-iid row is run: a label per island")
    parser.add_argument("--out", type=Path, help="page to write, with a figure beside it")
    parser.add_argument("--runs", default="runs/science", help="folder of the runs")
    parser.add_argument("--workers", type=_count, default=2, help="processes, of one thread each")
    parser.add_argument("--only", nargs="+", choices=rows, default=[], metavar="ROW", help=", ".join(rows))
    arguments = parser.parse_args()
    if arguments.only:  # a row that is named is meant, whichever table it stands in
        arguments.claims = "all"
    return arguments


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of them; give 1 or more")
    return int(text)


def _command(arguments: argparse.Namespace) -> str:
    """As given, without what depends on the machine: folders of the corpus and of the runs."""
    parts = ["python -m benchmarks.science"]
    parts += [f"--claims {arguments.claims}"] if not arguments.only else []
    parts += [f"--seeds {arguments.seeds}"]
    parts += [f"--first-seed {arguments.first_seed}"] if arguments.first_seed else []
    if arguments.corpus != str(CORPUS):
        parts += [f"--corpus {shlex.quote(Path(arguments.corpus).name)}"]
    if arguments.label_column:
        parts += [f"--label-column {arguments.label_column}"]
    return " ".join([*parts, *(["--only", *arguments.only] if arguments.only else [])])


if __name__ == "__main__":
    sys.exit(main())
