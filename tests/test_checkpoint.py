"""tinylm.checkpoint: what is loaded is what was saved, it is a real Llama, and whatever is not is refused by name."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from test_model import configs
from tinylm import checkpoint
from tinylm.checkpoint import SHIPPED, from_hf, load, read_card, save, to_hf
from tinylm.data import VALIDATION_PLAYS, VOCAB_SIZE, encode, shakespeare
from tinylm.files import sha256
from tinylm.model import Config, TinyLlama
from tinylm.train import evaluate

BASE = {"vocab_size": 40, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_len": 24}
KINDS = {
    "multi-head": {},
    "grouped": {"n_kv_heads": 2},
    "multi-query": {"n_kv_heads": 1},
    "untied": {"tie_embeddings": False},
    "other theta": {"rope_theta": 500_000.0, "max_len": 64},
    "other eps": {"norm_eps": 0.1},
    "all": {"n_kv_heads": 2, "tie_embeddings": False, "rope_theta": 77.0, "norm_eps": 1e-6, "n_layers": 3},
}
each_kind = pytest.mark.parametrize("change", KINDS.values(), ids=KINDS.keys())


def make(**change) -> TinyLlama:
    """A model whose gains and tables are large enough to matter."""
    torch.manual_seed(0)
    model = TinyLlama(Config(**{**BASE, **change})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1.5)
            elif name == "embed.weight":
                p.normal_(std=0.5)
    return model


def tokens(config: Config) -> torch.Tensor:
    return torch.randint(config.vocab_size, (3, config.max_len), generator=torch.Generator().manual_seed(1))


def same_weights(a: TinyLlama, b: TinyLlama) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Our own format


@each_kind
def test_what_is_loaded_is_what_was_saved(tmp_path, change):
    model = make(**change)
    save(model, tmp_path / "it", {"val_loss": 1.5})
    again = load(tmp_path / "it")
    assert again.config == model.config and same_weights(again, model) and not again.training
    assert (again.lm_head.weight is again.embed.weight) == model.config.tie_embeddings
    card = read_card(tmp_path / "it")
    assert card["val_loss"] == 1.5 and card["sha256"] == sha256(tmp_path / "it" / "model.safetensors")
    assert sorted(p.name for p in (tmp_path / "it").iterdir()) == ["card.json", "model.safetensors"]


def test_other_weights_than_the_cards_are_refused(tmp_path):
    save(make(), tmp_path / "a")
    save(make(norm_eps=0.1, tie_embeddings=False), tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"has sha256 \w{64}, its card says \w{64}: the file is damaged or was replaced"
    ):
        load(tmp_path / "a")


def test_weights_that_do_not_fit_the_cards_config_are_refused(tmp_path):
    save(make(), tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    for change, sentence in [
        ({"n_layers": 3}, "tensors missing .*blocks.2"),
        ({"n_layers": 1}, "tensors not supported .*blocks.1"),
        ({"hidden_dim": 50}, "has shape .* the config asks for"),
    ]:
        (tmp_path / "card.json").write_text(json.dumps({**card, "config": {**card["config"], **change}}))
        with pytest.raises(ValueError, match=sentence):
            load(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_a_truncated_file_is_refused_even_if_the_card_says_so(tmp_path, size):
    save(make(), tmp_path)
    os.truncate(path := tmp_path / "model.safetensors", size)
    with pytest.raises(ValueError, match="has sha256"):
        load(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps({**card, "sha256": sha256(path)}))
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load(tmp_path)


def test_missing_weights_are_named(tmp_path):
    save(make(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="is missing beside its card"):
        load(tmp_path)


def test_an_unknown_name_lists_what_is_shipped(tmp_path, monkeypatch):
    save(make(), tmp_path / "one-model")
    (tmp_path / "unfinished").mkdir()
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path)
    assert load("one-model").config == make().config
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'two-models'.*one of \['one-model'\]"):
        load("two-models")


# Hugging Face


@each_kind
def test_transformers_computes_the_same_logits_from_our_weights(tmp_path, change):
    from transformers import LlamaForCausalLM

    model = make(**change)
    theirs, report = LlamaForCausalLM.from_pretrained(to_hf(model, tmp_path), output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and theirs.dtype == torch.float32
    x = tokens(model.config)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x).logits, atol=1e-5, rtol=0)
    assert theirs.num_parameters() == model.config.n_params()
    assert same_weights(from_hf(tmp_path), model)


def llama(folder, dtype=torch.float32, shard=None, **change):
    """A random Llama that transformers wrote to a folder. Initialised wider than usual, so that every part matters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = Config(**{**BASE, **change})
    hf = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=c.hidden_dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        max_position_embeddings=c.max_len,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(2)
    model = LlamaForCausalLM(hf).to(dtype).eval()
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return c, model


@each_kind
def test_we_compute_the_same_logits_from_their_weights(tmp_path, change):
    config, theirs = llama(tmp_path, **change)
    model = from_hf(tmp_path)
    assert model.config == config
    x = tokens(config)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x).logits, atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(configs())
def test_logits_agree_both_ways_over_random_shapes(config):
    from transformers import LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model = make(**config.to_dict())
        theirs = LlamaForCausalLM.from_pretrained(to_hf(model, Path(folder) / "ours"))
        _, others = llama(Path(folder) / "theirs", **config.to_dict())
        x = tokens(config)
        with torch.no_grad():
            torch.testing.assert_close(model(x), theirs(x).logits, atol=1e-5, rtol=0)
            ours = from_hf(Path(folder) / "theirs")
            torch.testing.assert_close(ours(x), others(x).logits, atol=1e-5, rtol=0)


def test_bfloat16_weights_are_read_in_float32(tmp_path):
    from transformers import LlamaForCausalLM

    config, _ = llama(tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model, x = from_hf(tmp_path), tokens(config)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x).logits, atol=1e-5, rtol=0)


def test_sharded_weights_are_put_together(tmp_path):
    config, theirs = llama(tmp_path, shard="20KB", tie_embeddings=False)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    x = tokens(config)
    with torch.no_grad():
        torch.testing.assert_close(from_hf(tmp_path)(x), theirs(x).logits, atol=1e-5, rtol=0)
    shards[1].unlink()
    with pytest.raises(ValueError, match="tensors missing"):
        from_hf(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "RoPE scaling 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE scaling 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "RoPE scaling 'yarn'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial rotary embeddings"),
        ({"attention_bias": True}, "attention biases"),
        ({"mlp_bias": True}, "MLP biases"),
        ({"head_dim": 16}, r"head size 16 \(dim / heads is 8\)"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"model_type": "gpt2"}, "architecture 'gpt2'"),
        ({"model_type": "qwen3"}, "architecture 'qwen3'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized weights"),
    ],
)
def test_what_the_model_does_not_have_is_refused_by_name(tmp_path, change, sentence):
    to_hf(make(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=f"not supported: {sentence}$"):
        from_hf(tmp_path)


def test_tensors_that_the_model_does_not_have_are_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    path = to_hf(make(), tmp_path) / "model.safetensors"
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    save_file({**load_file(path), **extra}, path)
    with pytest.raises(ValueError, match=r"not supported \['model.layers.0.self_attn.q_proj.bias'\]"):
        from_hf(tmp_path)


def test_old_configs_keep_theta_at_the_top(tmp_path):
    model = make(rope_theta=1234.0)
    assert "rope_theta" in json.loads((to_hf(model, tmp_path) / "config.json").read_text())
    assert from_hf(tmp_path).config.rope_theta == 1234.0


def test_folders_without_what_is_needed_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        from_hf(tmp_path)
    (to_hf(make(), tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        from_hf(tmp_path)


# What is shipped

NAMES = sorted(p.parent.name for p in SHIPPED.glob("*/card.json"))
each_shipped = pytest.mark.parametrize("name", NAMES)


def test_both_sizes_are_shipped_and_nothing_is_pickled():
    assert {"shakespeare-30k", "shakespeare-800k"} <= set(NAMES)
    files = [p for p in SHIPPED.rglob("*") if p.is_file() and not p.name.startswith(".")]
    assert {p.name for p in files} == {"card.json", "model.safetensors"}


@each_shipped
def test_a_shipped_model_is_what_its_card_says(name):
    card, model = read_card(name), load(name)
    assert card["name"] == name and card["config"] == model.config.to_dict()
    assert card["data"]["sha256"] == shakespeare().sha256 and card["data"]["held_out"] == list(VALIDATION_PLAYS)
    assert model.config.vocab_size == VOCAB_SIZE and name in card["command"]
    assert (SHIPPED / name / "model.safetensors").stat().st_size < 10e6
    assert card["flops"] == pytest.approx(card["tokens"] * model.config.train_flops(256) / 256)
    # A part of the validation text is not the whole of it: near the card's value, and far from a uniform guess (4.56).
    part = evaluate(model, shakespeare().val_tokens, limit=40)
    assert part == pytest.approx(card["val_loss"], abs=0.15) and part < 2.5


def test_the_small_models_card_is_recomputed():
    card, model = read_card("shakespeare-30k"), load("shakespeare-30k")
    assert evaluate(model, shakespeare().val_tokens) == pytest.approx(card["val_loss"], abs=1e-3)
    for play, loss in card["val_loss_by_play"].items():
        assert evaluate(model, encode(shakespeare().val[play])) == pytest.approx(loss, abs=1e-3)


def test_the_large_model_reaches_its_target_on_plays_it_never_saw():
    card, model = read_card("shakespeare-800k"), load("shakespeare-800k")
    assert card["val_loss"] <= 1.45
    assert evaluate(model, shakespeare().val_tokens) <= 1.45
