"""BERT and RoBERTa against transformers: logits of its folders here, and of ours there, on random models.

Every model is drawn from a seed: sizes, an odd vocabulary, tied or untied head, token types, padding token, activation.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megagrow.checkpoint.hf import HFReader, write_hf_folder
from megagrow.checkpoint.source import load_model, open_source
from megagrow.config import ModelConfig
from megagrow.model.transformer import Transformer
from megagrow.parallel.mesh import Mesh
from megagrow.roles import parameter_names

LARGEST_DIFFERENCE = 1e-5
SEEDS = range(6)
CLASSES: dict[str, tuple[Any, Any]] = {
    "bert": (transformers.BertConfig, transformers.BertForMaskedLM),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForMaskedLM),
}
CASES = [
    pytest.param(family, tied, seed, id=f"{family}-{'tied' if tied else 'untied'}-{seed}")
    for family in CLASSES
    for tied in (True, False)
    for seed in SEEDS
]

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def random_config(family: str, tied: bool, seed: int) -> Any:
    draw = random.Random(f"{family} {tied} {seed}")
    heads = draw.choice([1, 2, 3, 5])
    return CLASSES[family][0](
        vocab_size=2 * draw.randrange(20, 200) + 1,
        hidden_size=heads * draw.choice([4, 6, 16]),
        num_hidden_layers=draw.randrange(1, 5),
        num_attention_heads=heads,
        intermediate_size=draw.randrange(7, 90),
        max_position_embeddings=draw.randrange(24, 60),
        type_vocab_size=draw.randrange(1, 4),
        pad_token_id=draw.randrange(0, 5),
        layer_norm_eps=draw.choice([1e-12, 1e-5, 1e-2]),
        hidden_act=draw.choice(["gelu", "gelu_new"]) if family == "bert" else "gelu",
        tie_word_embeddings=tied,
    )


def random_model(config: Any, seed: int) -> Any:
    """Biases, gains and the rows of padding random too."""
    torch.manual_seed(seed)
    model = CLASSES[config.model_type][1](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter.ndim == 1) + 0.2 * torch.randn_like(parameter))
    return model


def random_inputs(config: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens but for the padding one, which has no position in RoBERTa, and their types."""
    generator, shape = torch.Generator().manual_seed(seed), (3, 19)
    ids_BS = torch.randint(config.vocab_size - 1, shape, generator=generator)
    return ids_BS + (ids_BS >= config.pad_token_id), torch.randint(config.type_vocab_size, shape, generator=generator)


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert theirs.std() > 0.1
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize(("family", "tied", "seed"), CASES)
def test_logits_of_their_folder(tmp_path: Path, family: str, tied: bool, seed: int) -> None:
    config = random_config(family, tied, seed)
    theirs = random_model(config, seed)
    theirs.save_pretrained(tmp_path)
    ids_BS, types_BS = random_inputs(config, seed)
    ours = load_model(open_source(tmp_path), Mesh.single())
    with torch.no_grad():
        for types in (None, types_BS):
            expected = theirs(ids_BS, token_type_ids=types).logits
            assert difference(ours.logits(ids_BS, types), expected) <= LARGEST_DIFFERENCE


@pytest.mark.parametrize(("family", "tied", "seed"), CASES)
def test_their_class_loads_our_folder_unchanged(tmp_path: Path, family: str, tied: bool, seed: int) -> None:
    """No key is missing or left over, every tensor and every entry comes back, the logits are ours."""
    config = random_config(family, tied, seed)
    random_model(config, seed).save_pretrained(tmp_path / "theirs")
    model = HFReader(tmp_path / "theirs").model
    ours, weights = own_model(model, seed)
    write_hf_folder(tmp_path / "ours", model, weights.__getitem__)
    back, report = CLASSES[family][1].from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    ids_BS, types_BS = random_inputs(config, seed)
    with torch.no_grad():
        theirs = back.eval()(ids_BS, token_type_ids=types_BS).logits
        assert difference(ours.logits(ids_BS, types_BS), theirs) <= LARGEST_DIFFERENCE
    reader = HFReader(tmp_path / "ours")
    assert (reader.model, reader.dropped) == (model, [])
    assert all(torch.equal(reader.fetch(name), weights[name]) for name in parameter_names(model))


def own_model(model: ModelConfig, seed: int) -> tuple[Transformer, dict[str, Tensor]]:
    ours, generator = Transformer(model), torch.Generator().manual_seed(seed)
    weights = {name: parameter.data for name, parameter in ours.named_parameters()}
    for tensor in weights.values():
        tensor.copy_((tensor.ndim == 1) + 0.2 * torch.randn(tensor.shape, generator=generator))
    return ours, weights


@pytest.mark.parametrize("family", CLASSES)
def test_the_classes_of_the_other_heads_find_their_body(tmp_path: Path, family: str) -> None:
    """A folder of ours is where fine-tuning begins: all that is new there is the pooler and the classifier."""
    config = random_config(family, True, 0)
    random_model(config, 0).save_pretrained(tmp_path / "theirs")
    model = HFReader(tmp_path / "theirs").model
    write_hf_folder(tmp_path / "ours", model, own_model(model, 0)[1].__getitem__)
    _, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert all("classifier" in name or "pooler" in name for name in report["missing_keys"]), report
    assert not report["mismatched_keys"]
