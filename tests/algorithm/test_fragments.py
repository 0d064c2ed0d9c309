"""Fragments: every tensor has one place, and a round trip through the flat vectors changes nothing."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco_ray.algorithm.fragments import Layout, partition
from diloco_ray.errors import ConfigError, RunMismatchError

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
