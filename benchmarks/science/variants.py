"""What is trained: one recipe, jobs/sotu_4islands_cpu.yaml, and the fields in which each variant differs from it.

DiLoCo is the recipe itself: 4 islands, H = 25, outer Nesterov 0.7 / 0.9, float32 both ways. All start from one warm
start per seed (jobs/sotu_warm_start.yaml) but those from scratch.
"""

from dataclasses import dataclass

RECIPE = "jobs/sotu_4islands_cpu.yaml"
WARM_START = "jobs/sotu_warm_start.yaml"


@dataclass(frozen=True)
class Variant:
    """fields: overrides as `--set` takes them; {label_column} stands for the corpus's."""

    name: str
    fields: tuple[str, ...] = ()
    from_scratch: bool = False
    on_ray: bool = False  # a process per island instead of the in-process engine; the first seed only

    @property
    def needs_labels(self) -> bool:
        return any("{label_column}" in field for field in self.fields)


def _both(codec: str) -> tuple[str, str]:
    return f"sync.uplink={codec}", f"sync.downlink={codec}"


ONE = ("islands=1", "outer.optimizer=sgd", "outer.learning_rate=1")  # an ordinary training run
EIGHT = ("islands=8",)
SGD_1 = ("outer.optimizer=sgd", "outer.learning_rate=1")
LOW = ("outer.learning_rate=0.2",)
DELAYED, EAGER = ("sync.overlap=25",), ("sync.overlap=25", "sync.eager=true")
FRAGMENTS = ("sync.fragments=4",)
TAU_5 = (*FRAGMENTS, "sync.overlap=5", "sync.mixing=0.5")
MUON = ("inner.optimizer=muon",)
SPEEDS = ("experiment.speeds=[1, 0.75, 0.5, 0.25]",)

_ALL = (
    Variant("DiLoCo"),
    Variant("one worker", ONE),
    Variant("data parallel", (*ONE, "inner.batch_size=16")),  # one worker with the batch of four
    Variant("FedAvg", SGD_1),
    Variant("H = 5", ("inner.steps_per_round=5", "rounds=160")),
    Variant("H = 100", ("inner.steps_per_round=100", "rounds=8")),
    Variant("H = 200", ("inner.steps_per_round=200", "rounds=4")),
    Variant("one island", ("islands=1",)),
    Variant("one island 0.5 / 0.5", ("islands=1", "outer.learning_rate=0.5", "outer.momentum=0.5")),
    Variant("k = 2", ("islands=2",)),
    Variant("k = 8", EIGHT),
    Variant("k = 16", ("islands=16",)),
    Variant("30 % dropped", ("experiment.drop_probability=0.3",)),
    Variant("50 % dropped", ("experiment.drop_probability=0.5",)),
    Variant("int8", _both("int8")),
    Variant("int4", _both("int4")),
    Variant("e3m0", _both("e3m0")),
    Variant("ternary", _both("ternary")),
    Variant("ternary, feedback", (*_both("ternary"), "sync.error_feedback=1", "sync.downlink_error_feedback=true")),
    Variant("top-k", ("sync.uplink=topk",)),
    Variant("top-k, feedback", ("sync.uplink=topk", "sync.error_feedback=0.95")),
    Variant("4 fragments, tau 0", FRAGMENTS),
    Variant("4 fragments, tau 5", (*TAU_5, "outer.learning_rate=0.4")),  # the paper's own rate
    Variant("4 fragments, tau 5, 0.7 / 0.9", TAU_5),
    Variant("4 fragments, tau 5, no mixing", (*FRAGMENTS, "sync.overlap=5")),
    Variant("4 fragments, tau 5, e3m0", (*TAU_5, "outer.learning_rate=0.4", *_both("e3m0"))),
    Variant("delayed 0.2 / 0.9", (*DELAYED, *LOW)),
    Variant("eager 0.2 / 0.9", (*EAGER, *LOW)),
    Variant("delayed SGD 1", (*DELAYED, *SGD_1)),
    Variant("eager SGD 1", (*EAGER, *SGD_1)),
    Variant("a label per island", ("data.shards=label", "data.label_column={label_column}")),
    Variant("DiLoCo on Ray", on_ray=True),
    Variant("k = 8, doubling", (*EIGHT, "experiment.islands_by_round=doubling")),
    Variant("k = 8, halving", (*EIGHT, "experiment.islands_by_round=halving")),
    Variant("k = 8, ramp up", (*EIGHT, "experiment.islands_by_round=ramp_up")),
    Variant("k = 8, ramp down", (*EIGHT, "experiment.islands_by_round=ramp_down")),
    Variant("uneven speeds", SPEEDS),
    Variant("async, uneven speeds", ("sync.preset=async", *SPEEDS)),
    Variant("async, plain Nesterov, uneven speeds", ("sync.closes=arrival", *SPEEDS)),
    Variant("decoupled, uneven speeds", ("sync.preset=decoupled", "sync.fragments=8", *SPEEDS)),
    Variant("radial", ("outer.combine=radial",)),
    Variant("radial 0.35", ("outer.combine=radial", "outer.learning_rate=0.35")),
    Variant("Muon", (*MUON, "outer.momentum=0.6")),
    Variant("Muon, one worker", (*MUON, *ONE)),
    Variant("DiLoCo from scratch", from_scratch=True),
    Variant("one worker from scratch", ONE, from_scratch=True),
)
VARIANTS = {variant.name: variant for variant in _ALL}
