"""Fragments: every tensor has one place, and a round trip through the flat vectors changes nothing."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco_ray.algorithm.fragments import Layout, partition
from diloco_ray.errors import ConfigError, CorruptionError, RunMismatchError

SHAPES = {
    "embed": (50, 8),
    "block.0.w": (8, 8),
    "block.0.b": (8,),
    "block.1.w": (8, 8),
    "temperature": (),
    "head": (50, 8),
}


def model(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.data())
def test_a_partition_is_contiguous_complete_and_balanced(sizes: list[int], data: st.DataObject):
    num_fragments = data.draw(st.integers(1, len(sizes)))
    layout = partition({f"t{i}": (size,) for i, size in enumerate(sizes)}, num_fragments)
    assert [fragment.index for fragment in layout.fragments] == list(range(num_fragments))
    assert all(fragment.slots for fragment in layout.fragments)
    assert [slot.name for fragment in layout.fragments for slot in fragment.slots] == [
        f"t{i}" for i in range(len(sizes))
    ]
    for fragment in layout.fragments:
        ends = [0] + [slot.offset + slot.num_values for slot in fragment.slots]
        assert [slot.offset for slot in fragment.slots] == ends[:-1]
        assert fragment.num_values == ends[-1]
    assert layout.num_values == sum(sizes)
    assert max(fragment.num_values for fragment in layout.fragments) <= sum(sizes) / num_fragments + max(sizes)


def test_equal_tensors_are_cut_into_equal_fragments():
    layout = partition({f"layer.{i}": (10, 10) for i in range(24)}, 6)
    assert [fragment.num_values for fragment in layout.fragments] == [400] * 6


@pytest.mark.parametrize("num_fragments", [0, -1, 7])
def test_an_impossible_number_of_fragments_names_the_values_and_the_range(num_fragments: int):
    with pytest.raises(ConfigError, match=rf"num_fragments={num_fragments}, .* 6 tensors(.|\n)*choose 1 to 6"):
        partition(SHAPES, num_fragments)


def test_a_model_without_tensors_has_no_layout():
    with pytest.raises(ConfigError, match="0 tensors"):
        partition({})


@pytest.mark.parametrize("num_fragments", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gather_then_scatter_gives_the_same_model(num_fragments: int, dtype: torch.dtype):
    source = model(dtype)
    target = {name: torch.nn.Parameter(torch.zeros_like(tensor)) for name, tensor in source.items()}
    for fragment in partition(SHAPES, num_fragments).fragments:
        flat = torch.empty(fragment.num_values)
        fragment.gather_(source, flat)
        fragment.scatter_(flat, target)
    for name in SHAPES:
        torch.testing.assert_close(target[name].data, source[name].to(torch.float32).to(dtype), rtol=0, atol=0)
        assert target[name].grad_fn is None


def test_a_flat_vector_is_the_tensors_row_by_row_also_when_memory_lies_otherwise():
    tensors = model()
    tensors["embed"] = tensors["embed"].t().contiguous().t()
    flat = torch.empty(partition(SHAPES).num_values)
    partition(SHAPES).fragments[0].gather_(tensors, flat)
    assert torch.equal(flat, torch.cat([tensors[name].reshape(-1) for name in SHAPES]))


def test_another_model_is_refused_by_name_and_shape_and_left_as_it_was():
    (fragment,) = partition(SHAPES).fragments
    other = model() | {"head": torch.zeros(8, 50)}
    before = other["embed"].clone()
    with pytest.raises(
        RunMismatchError, match=r"'head': the run's layout has shape \(50, 8\), this model has shape \(8, 50\)"
    ):
        fragment.scatter_(torch.zeros(fragment.num_values), other)
    assert torch.equal(other["embed"], before)
    del other["head"]
    with pytest.raises(RunMismatchError, match=r"'head'.* no such tensor"):
        fragment.gather_(other, torch.empty(fragment.num_values))


def test_a_layout_survives_json_and_its_digest_tells_layouts_apart():
    layout = partition(SHAPES, 3)
    again = Layout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again == layout
    assert again.digest() == layout.digest()
    assert layout.digest() != partition(SHAPES, 2).digest()
    assert layout.digest() != partition(SHAPES | {"head": (8, 50)}, 3).digest()


@pytest.mark.parametrize("change", [{"index": 1}, {"slots": 5}, {"slots": []}])
def test_what_is_no_layout_is_refused(change: dict[str, Any]):
    body = json.loads(json.dumps(partition(SHAPES, 1).to_dict()))
    body["fragments"][0].update(change)
    with pytest.raises(CorruptionError, match="no layout of a model"):
        Layout.from_dict(body)


# ---- other ways to cut ----

TRANSFORMER = {
    "model.embed_tokens.weight": (256, 16),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in range(12)
        for name, shape in (("attn.q.weight", (16, 16)), ("mlp.experts.0.weight", (16, 32)), ("norm.weight", (16,)))
    },
    "model.norm.weight": (16,),
    "lm_head.weight": (256, 16),
}


def names_in(layout: Layout) -> list[list[str]]:
    return [[slot.name for slot in fragment.slots] for fragment in layout.fragments]


def assert_complete(layout: Layout, shapes: dict[str, tuple[int, ...]]):
    """Every tensor once, end to end, in model order within its fragment."""
    found = names_in(layout)
    assert sorted(name for names in found for name in names) == sorted(shapes)
    assert all(found)
    assert [fragment.index for fragment in layout.fragments] == list(range(len(found)))
    for fragment, names in zip(layout.fragments, found):
        assert names == [name for name in shapes if name in set(names)]
        ends = [0] + [slot.offset + slot.num_values for slot in fragment.slots]
        assert [slot.offset for slot in fragment.slots] == ends[:-1]
        assert all(slot.num_values == math.prod(slot.shape) == math.prod(shapes[slot.name]) for slot in fragment.slots)


@pytest.mark.parametrize("how", ["sequential", "strided", "balanced"])
def test_one_fragment_is_the_whole_model_in_order_whichever_way(how: Any):
    for shapes in (SHAPES, TRANSFORMER, {"w": (3,)}):
        assert names_in(partition(shapes, 1, how)) == [list(shapes)]


def test_strided_fragments_hold_every_so_many_th_layer_and_the_first_what_is_outside():
    layout = partition(TRANSFORMER, 5, "strided")
    assert_complete(layout, TRANSFORMER)
    outside, *strided = names_in(layout)
    assert outside == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    layers = [list(dict.fromkeys(int(name.split(".")[2]) for name in names)) for names in strided]
    assert layers == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert len({len(names) for names in strided}) == 1


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["wte", "h.7.w", "h.9.w", "ln"], [["wte", "ln"], ["h.7.w"], ["h.9.w"]]),  # order counts, not the number
        (["in.w", "0.w", "2.w"], [["in.w"], ["0.w"], ["2.w"]]),
        (["emb", "enc.0.w", "dec.0.w"], [["emb"], ["enc.0.w"], ["dec.0.w"]]),  # two stacks count on
        (["emb", "h.0.w", "h.0.b", "h.1"], [["emb"], ["h.0.w", "h.0.b"], ["h.1"]]),
        (["layer1.w", "2nd.w", "0.w", "1.w"], [["layer1.w", "2nd.w"], ["0.w"], ["1.w"]]),  # a number stands alone
    ],
    ids=str,
)
def test_a_layer_is_what_shares_the_first_number_of_its_name(names: list[str], groups: list[list[str]]):
    assert names_in(partition(dict.fromkeys(names, (2, 2)), 3, "strided")) == groups


@pytest.mark.parametrize(
    ("names", "num_fragments", "said"),
    [
        (["emb", "h.0.w", "h.0.b", "h.1.w"], 4, "needs 3 layers .* has 2 layers and 1 tensors .*choose 1 to 3, or"),
        (["emb", "mid", "head"], 2, "has 0 layers and 3 tensors .*choose 1, or another partition"),
        (["0.w", "1.w", "2.w"], 2, "has 3 layers and 0 tensors .*choose 1, or another partition"),
    ],
    ids=str,
)
def test_strided_fragments_that_would_be_empty_are_refused(names: list[str], num_fragments: int, said: str):
    with pytest.raises(ConfigError, match=f"(?s)num_fragments={num_fragments} strided .*{said}"):
        partition(dict.fromkeys(names, (2, 2)), num_fragments, "strided")


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.data())
def test_balanced_fragments_differ_by_no_more_than_a_tensor(sizes: list[int], data: st.DataObject):
    num_fragments = data.draw(st.integers(1, len(sizes)))
    shapes = {f"t{i}": (size,) for i, size in enumerate(sizes)}
    layout = partition(shapes, num_fragments, "balanced")
    assert_complete(layout, shapes)
    loads = [fragment.num_values for fragment in layout.fragments]
    for fragment in layout.fragments:  # without its smallest tensor, packed last, it was the lightest
        assert fragment.num_values - min(slot.num_values for slot in fragment.slots) <= min(loads)


def test_balanced_packing_by_hand():
    shapes = {"a": (3,), "b": (9,), "c": (4,), "d": (4,), "e": (2,), "f": (5,)}
    # b 9 | f 5 | c 4 | d 4 to c's | a 3 to f's | e 2: f and a are 8, c and d are 8, the lower index has it
    assert names_in(partition(shapes, 3, "balanced")) == [["b"], ["a", "e", "f"], ["c", "d"]]


def test_balanced_fragments_are_nearer_to_equal_than_runs_of_the_model():
    def spread(how: Any) -> int:
        loads = [fragment.num_values for fragment in partition(TRANSFORMER, 6, how).fragments]
        return max(loads) - min(loads)

    assert spread("balanced") < spread("sequential")
