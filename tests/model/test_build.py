import pytest
import torch
from torch import nn

from diloco_ray.errors import ConfigError, DiLoCoError, RunMismatchError
from diloco_ray.model.build import build_model, build_outline, parameter_shapes, trainable_parameters
from diloco_ray.model.settings import ModelSettings


def build(seed: int = 0, vocab_size: int = 256, eos_token_id: int = 0, **settings):
    return build_model(ModelSettings(**settings), seed=seed, vocab_size=vocab_size, eos_token_id=eos_token_id)


def equal(a, b) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_seed_decides_every_bit_and_the_callers_randomness_is_untouched(tiny_llama):
    before = torch.get_rng_state()
    first = build(config=tiny_llama, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert equal(first, build(config=tiny_llama, seed=3))
    torch.set_num_threads(threads)
    assert not equal(first, build(config=tiny_llama, seed=4))
    assert {tensor.dtype for tensor in first.state_dict().values()} == {torch.float32}
    assert first.training


def test_the_tokenizer_fills_what_the_configuration_leaves_open(tiny_llama):
    config = build(config=tiny_llama, vocab_size=300, eos_token_id=7).config
    assert (config.vocab_size, config.eos_token_id, config.bos_token_id, config.pad_token_id) == (300, 7, 7, None)
    assert build(config={**tiny_llama, "vocab_size": 512}).config.vocab_size == 512


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_with_both_numbers(tiny_llama, model, tmp_path):
    with pytest.raises(RunMismatchError, match=r"vocab_size=100 .* 256"):
        build(config={**tiny_llama, "vocab_size": 100})
    model.save_pretrained(tmp_path)
    with pytest.raises(RunMismatchError, match=r"vocab_size=256 .* 300"):
        build(path=str(tmp_path), vocab_size=300)


def test_half_precision_in_the_configuration_is_still_float32_here(tiny_llama):
    model = build(config={**tiny_llama, "dtype": "bfloat16", "attn_implementation": "eager"})
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "eager"


def test_a_misspelt_field_is_refused_with_the_nearest_name(tiny_llama):
    with pytest.raises(ConfigError, match="did you mean num_hidden_layers") as caught:
        build(config={**tiny_llama, "num_hidden_layer": 3})
    assert caught.value.where == "model.config.num_hidden_layer"


def test_fields_of_older_configurations_are_taken(tiny_llama):
    assert build(config={**tiny_llama, "rope_theta": 5000.0, "tie_word_embeddings": True})


@pytest.mark.parametrize(
    "fields", [{"model_type": "no-such-family"}, {"num_attention_heads": 5}, {"hidden_act": "no-such-activation"}]
)
def test_a_configuration_that_cannot_be_built_is_a_config_error(tiny_llama, fields):
    with pytest.raises(ConfigError):
        build(config={**tiny_llama, **fields})


def test_a_folder_with_weights_is_loaded_and_one_without_is_initialised(model, tiny_llama, tmp_path):
    model.save_pretrained(tmp_path / "with")
    assert equal(build(path=str(tmp_path / "with"), seed=9), model)
    model.config.save_pretrained(tmp_path / "without")
    assert equal(build(path=str(tmp_path / "without"), seed=0), model)


@pytest.mark.parametrize("path", ["/no/such/folder", "nobody/no-such-model"])
def test_a_model_that_is_nowhere_is_a_config_error(path):
    with pytest.raises(ConfigError, match=path):
        build(path=path)


def test_pickled_weights_are_not_passed_over_in_silence(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match="none as safetensors"):
        build(path=str(tmp_path))


def test_a_factory_is_told_what_it_asks_for():
    first = build(factory="plain_module:build", vocab_size=70, seed=1)
    assert first.embedding.num_embeddings == 70
    assert equal(first, build(factory="plain_module:build", vocab_size=70, seed=1))
    assert build(factory="plain_module:build_fixed").embedding.num_embeddings == 50


@pytest.mark.parametrize("factory", ["no_such_module:f", "plain_module:no_such", "plain_module:build_nothing"])
def test_a_factory_that_gives_no_module_is_a_config_error(factory):
    with pytest.raises(DiLoCoError) as caught:
        build(factory=factory)
    assert caught.value.where == "model.factory"
    assert caught.value.remedy


def test_trainable_parameters_are_the_models_own_floats_with_tied_weights_once(tiny_llama):
    plain = build(factory="plain_module:build", vocab_size=70)
    assert parameter_shapes(plain) == {"embedding.weight": (70, 16)}
    assert trainable_parameters(plain)["embedding.weight"] is plain.head.weight
    tied = build(config={**tiny_llama, "tie_word_embeddings": True})
    loose = build(config={**tiny_llama, "tie_word_embeddings": False})
    assert set(parameter_shapes(loose)) - set(parameter_shapes(tied)) == {"lm_head.weight"}
    assert list(trainable_parameters(loose)) == [name for name, _ in loose.named_parameters()]


def outline(**settings):
    return build_outline(ModelSettings(**settings), seed=0, vocab_size=256, eos_token_id=0)


def test_an_outline_has_the_shapes_ties_and_buffers_of_the_model_but_no_values(tiny_llama, model, tmp_path):
    model.save_pretrained(tmp_path)
    whole = build(config=tiny_llama)
    for found in (outline(config=tiny_llama), outline(path=str(tmp_path))):
        assert parameter_shapes(found) == parameter_shapes(whole)
        assert all(parameter.is_meta for parameter in found.parameters())
        buffers = dict(found.named_buffers())
        assert buffers
        assert all(torch.equal(buffers[name], buffer) for name, buffer in whole.named_buffers())
    assert not nn.Linear(2, 2).weight.is_meta


class Frozen(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)
        self.bias.requires_grad_(False)


class Looks(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)
        self.largest = self.weight.max().item()


@pytest.mark.parametrize("name", ["Frozen", "Looks"])
def test_a_model_that_needs_its_values_is_not_outlined(name):
    factory = f"{__name__}:{name}"
    assert equal(outline(factory=factory), build(factory=factory))
