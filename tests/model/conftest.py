import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from diloco_ray.model.build import build_model
from diloco_ray.model.settings import ModelSettings

TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def tiny_llama() -> dict:
    return dict(TINY_LLAMA)


@pytest.fixture
def model() -> torch.nn.Module:
    return build_model(ModelSettings(config=TINY_LLAMA), seed=0, vocab_size=256, eos_token_id=0)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    """256 bytes, as Hugging Face files; made here, since model/ knows nothing of data/."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=letters[0]).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_path)
