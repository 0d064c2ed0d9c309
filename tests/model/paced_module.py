"""A language model that takes its time while a file is there: a test ends its run by removing the file, however fast
the machine is."""

import contextlib
import os
import time
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor, nn

from tests.model.plain_module import PlainModel

PACE = "DILOCO_RAY_TEST_PACE"  # names the file, in which the seconds of an inner step are


class PacedModel(PlainModel):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        if self.training:
            with contextlib.suppress(KeyError, FileNotFoundError):
                time.sleep(float(Path(os.environ[PACE]).read_text()))
        return super().forward(input_ids, labels)


def build(vocab_size: int) -> nn.Module:
    return PacedModel(vocab_size)


def build_wide(vocab_size: int) -> nn.Module:
    """In float32 its contributions are too large for a call of Ray's: they travel through the object store."""
    return PacedModel(vocab_size, width=128)
