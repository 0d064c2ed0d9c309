import json
import math

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from diloco_ray.errors import ConfigError, StoreError
from diloco_ray.model.build import build_model
from diloco_ray.model.export import export_model, sample_text, validation_loss
from diloco_ray.model.settings import ModelSettings


@pytest.fixture
def plain():
    return build_model(ModelSettings(factory="plain_module:build"), seed=0, vocab_size=256, eos_token_id=0)


def test_an_export_loads_with_transformers_alone(model, tokenizer_path, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    to = export_model(model, tokenizer_path, str(tmp_path / "new folder" / "out"), {"version": 12})
    loaded = AutoModelForCausalLM.from_pretrained(to)
    tokens = AutoTokenizer.from_pretrained(to)("hello", return_tensors="pt")["input_ids"]
    model.eval()
    assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert json.loads((tmp_path / "new folder" / "out" / "diloco_ray.json").read_text()) == {"version": 12}
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["out"]


def test_an_earlier_export_is_replaced_and_anything_else_is_left_alone(model, plain, tmp_path):
    export_model(model, None, str(tmp_path / "out"), {"version": 1})
    export_model(plain, None, str(tmp_path / "out"), {"version": 2})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["diloco_ray.json", "model.safetensors"]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["embedding.weight"], plain.embedding.weight)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for target in ("mine", "mine/thesis.txt"):
        with pytest.raises(StoreError, match="something else lies here"):
            export_model(model, None, str(tmp_path / target), {})
    with pytest.raises(StoreError):
        export_model(model, None, str(tmp_path / "mine" / "thesis.txt" / "under"), {})
    (tmp_path / "empty").mkdir()
    export_model(plain, None, str(tmp_path / "empty"), {})


def test_an_export_goes_to_any_fsspec_path(model, plain, tokenizer_path):
    fs = fsspec.filesystem("memory")
    for _ in range(2):
        assert export_model(model, tokenizer_path, "memory://exports/a", {}) == "memory:///exports/a"
    names = {path.removeprefix("/exports/a/") for path in fs.find("/exports/a")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "diloco_ray.json"} <= names
    export_model(plain, None, "memory://exports/a", {})
    assert fs.find("/exports/a") == ["/exports/a/diloco_ray.json", "/exports/a/model.safetensors"]


def test_validation_loss_is_the_mean_over_tokens_of_all_batches(model):
    tokens_BT = torch.randint(0, 256, (7, 20), generator=torch.Generator().manual_seed(0))
    logits = model.eval()(input_ids=tokens_BT).logits.double()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).item()
    model.train()
    found = validation_loss(model, [tokens_BT[:4], tokens_BT[4:]])
    assert math.isclose(found, expected, rel_tol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="no batches"):
        validation_loss(model, [])


def test_measuring_leaves_each_part_in_the_mode_it_was_in(model):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    validation_loss(model, [torch.zeros(1, 4, dtype=torch.int64)])
    assert [module.training for module in model.modules()] == modes


def test_a_sample_follows_its_seed_and_starts_with_its_prompt(model, plain, tokenizer):
    before = torch.get_rng_state()
    with torch.no_grad():
        plain.embedding.weight.mul_(0.1)
    for each in (model, plain):
        texts = [sample_text(each, tokenizer, "The ", 30, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]
        assert texts[0].startswith("The ")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cache_changes_nothing(model, tokenizer):
    found = sample_text(model, tokenizer, "The ", 20, temperature=0)
    tokens = torch.tensor([tokenizer.encode("The ")])
    expected = model.eval().generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    assert found == tokenizer.decode(expected[0])


def test_a_sample_ends_with_the_models_positions_and_may_start_from_nothing(model, tokenizer):
    prompt = "a" * 60
    assert sample_text(model, tokenizer, prompt, 0) == prompt
    assert len(prompt) < len(sample_text(model, tokenizer, prompt, 1000, temperature=0)) <= 64
    assert sample_text(model, tokenizer, "a" * 100, 5) == "a" * 100
    assert sample_text(model, tokenizer, "", 5, temperature=0)


def test_a_sample_stops_at_the_end_token(plain, tokenizer):
    with torch.no_grad():
        plain.embedding.weight.zero_()  # every token equally likely: the first of them is the end token
    assert sample_text(plain, tokenizer, "The ", 50, temperature=0) == "The "


def test_a_model_without_logits_cannot_be_sampled(tokenizer):
    model = build_model(ModelSettings(factory="plain_module:build_fixed"), seed=0, vocab_size=50, eos_token_id=0)
    with pytest.raises(ConfigError, match="PlainModel gives no logits"):
        sample_text(model, tokenizer, "!", 5)
