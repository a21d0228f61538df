"""What could not be saved is found before any training."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig

WRONG = {"do_sample": False, "temperature": 0.6}


def loaded(folder, **tokens):
    """As transformers loads it, which then saves it even if it contradicts itself."""
    config = GenerationConfig(**WRONG, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    config.to_json_file(str(folder / "generation_config.json"), use_diff=True)
    config = GenerationConfig.from_pretrained(str(folder))
    config.update(**tokens)
    return config


@pytest.mark.filterwarnings("ignore")
def test_a_changed_configuration_that_contradicts_itself_stops_the_run(
    make_trainer, tiny_model, tmp_path
):
    # As the Trainer changes it where the tokenizer has another token.
    model = tiny_model()
    model.generation_config = loaded(tmp_path, pad_token_id=3)
    steps = []
    model.register_forward_hook(lambda *_: steps.append(model.training))
    trainer = make_trainer(model=model, max_steps=1, save_strategy="no")
    with pytest.raises(ValueError, match=r"generation_config\.json of the model, .*temperature"):
        trainer.train()
    assert not any(steps)
    # Only the adapter is saved there.
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model.generation_config = loaded(tmp_path, pad_token_id=3)
    make_trainer(model=model, max_steps=1, peft_config=peft.LoraConfig()).train()


@pytest.mark.filterwarnings("ignore")
def test_one_as_it_was_loaded_is_saved_as_transformers_does(make_trainer, tiny_model, tmp_path):
    model = tiny_model()
    model.generation_config = loaded(tmp_path)
    try:
        model.generation_config.save_pretrained(tmp_path)
    except ValueError:
        pytest.skip("this release of transformers does not save it either")
    trainer = make_trainer(model=model, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert GenerationConfig.from_pretrained(str(tmp_path / "saved")).temperature == 0.6


def tie_head(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def tie_layers(model):
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight


@pytest.mark.parametrize("tie", [tie_head, tie_layers])
def test_weights_tied_by_hand_stop_the_run(make_trainer, tiny_model, tie):
    model = tiny_model()
    tie(model)
    trainer = make_trainer(model=model, max_steps=1)
    with pytest.raises(ValueError, match=r"one tensor for .* and .*, which the configuration does"):
        trainer.train()


def test_weights_that_the_configuration_ties_do_not(make_trainer, tiny_model):
    make_trainer(model=tiny_model(tie_word_embeddings=True), max_steps=1).train()
