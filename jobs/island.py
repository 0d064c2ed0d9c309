"""One island of a run whose coordinator is elsewhere, as a Ray job of the island's own cluster.

    ray job submit --working-dir . -- python jobs/island.py s3://bucket/runs/quickstart --name eu-1

The same as `diloco-ray join`. DILOCO_RAY_TOKEN has the island's token.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a cluster that has only the job's working directory

from diloco_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "join")
    main()
