"""Checkpoints: safetensors and a JSON card, never pickle; and the way to and from Hugging Face's Llama format."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tinylm.files import replacing, sha256, write_json
from tinylm.model import Config, TinyLlama

SHIPPED = Path(__file__).parent / "assets" / "checkpoints"


def _tensors(model: TinyLlama) -> dict[str, torch.Tensor]:
    tied = model.config.tie_embeddings
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    return {k: v for k, v in state.items() if not (tied and k == "lm_head.weight")}


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); fetch or save it again") from error


def _fill(model: TinyLlama, tensors: dict[str, torch.Tensor], source: Path) -> TinyLlama:
    """Copy tensors into the model after checking that names and shapes are exactly the expected ones."""
    expected = _tensors(model)
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"{source}: tensors missing {missing or 'none'}, tensors not supported {extra or 'none'}")
    for name, t in tensors.items():
        if t.shape != expected[name].shape:
            raise ValueError(f"{source}: {name} has shape {tuple(t.shape)}, the config asks for {tuple(expected[name].shape)}")
    model.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    return model.eval()


def save(model: TinyLlama, folder: str | Path, card: dict | None = None) -> Path:
    """Write `model.safetensors` and `card.json` (the config, the file's sha256 and whatever `card` adds).

    Each file is replaced whole, the card last: killed in between, an overwritten checkpoint no longer fits its card
    and `load` refuses it.
    """
    folder = Path(folder)
    with replacing(folder / "model.safetensors") as temporary:
        save_file(_tensors(model), temporary)
        digest = sha256(temporary)
    write_json(folder / "card.json", {**(card or {}), "config": model.config.to_dict(), "sha256": digest})
    return folder


def read_card(name_or_folder: str | Path) -> dict:
    """The card of a shipped checkpoint (by name) or of a folder. Raises FileNotFoundError naming what is shipped."""
    for folder in (SHIPPED / str(name_or_folder), Path(name_or_folder)):
        if (folder / "card.json").is_file():
            return {**json.loads((folder / "card.json").read_text(encoding="utf-8")), "folder": str(folder)}
    names = sorted(p.name for p in SHIPPED.glob("*") if (p / "card.json").is_file())
    raise FileNotFoundError(f"no checkpoint {str(name_or_folder)!r}: give a folder with a card.json, or one of {names}")


def load(name_or_folder: str | Path) -> TinyLlama:
    """Load a shipped checkpoint by name, such as "shakespeare-800k", or a folder that `save` wrote; the model is on the CPU.

    Raises ValueError when the weights do not have the card's sha256 or do not fit its config.
    """
    card = read_card(name_or_folder)
    path = Path(card["folder"]) / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing beside its card")
    digest = sha256(path)
    if digest != card["sha256"]:
        raise ValueError(f"{path} has sha256 {digest}, its card says {card['sha256']}: the file is damaged or was replaced")
    return _fill(TinyLlama(Config(**card["config"])), _read_tensors(path), path)


# Hugging Face

_TO_HF = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^norm\.", "model.norm."),
    (r"^blocks\.(\d+)\.attention_norm\.", r"model.layers.\1.input_layernorm."),
    (r"^blocks\.(\d+)\.mlp_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"^blocks\.(\d+)\.attention\.", r"model.layers.\1.self_attn."),
    (r"^blocks\.(\d+)\.mlp\.", r"model.layers.\1.mlp."),
)


def hf_name(name: str) -> str:
    """Our name of a weight in Hugging Face's Llama, such as blocks.0.attention.q_proj.weight."""
    for pattern, replacement in _TO_HF:
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    return name


def to_hf(model: TinyLlama, folder: str | Path) -> Path:
    """Write `config.json` and `model.safetensors` that `transformers.LlamaForCausalLM.from_pretrained(folder)` loads."""
    c, folder = model.config, Path(folder)
    with replacing(folder / "model.safetensors") as temporary:
        save_file({hf_name(k): v for k, v in _tensors(model).items()}, temporary, {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_len,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    write_json(folder / "config.json", config)
    return folder


def from_hf(folder_or_name: str | Path) -> TinyLlama:
    """Load a Hugging Face Llama checkpoint, in float32: a folder, or a hub name such as "HuggingFaceTB/SmolLM2-135M".

    Raises ValueError naming what this model does not have: RoPE scaling, biases, a head size other than dim / heads,
    another activation or architecture, quantized weights.
    """
    folder = Path(folder_or_name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download  # only for hub names, so not a dependency of tinylm

        folder = Path(snapshot_download(str(folder_or_name), allow_patterns=["config.json", "*.safetensors", "*.index.json"]))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a Hugging Face checkpoint")
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = _config_from_hf(hf, folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no .safetensors file; pickled weights are not read")
    tensors = {k: v for f in files for k, v in _read_tensors(f).items()}
    model = TinyLlama(config)
    ours = {hf_name(name): name for name in model.state_dict()}
    tensors = {ours.get(k, k): v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    return _fill(model, tensors, folder)


def _config_from_hf(hf: dict, folder: Path) -> Config:
    # Since version 5 transformers writes theta and scaling under rope_parameters, earlier at the top and in rope_scaling.
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    dim, heads = hf.get("hidden_size"), hf.get("num_attention_heads")
    unsupported = {
        f"architecture {hf.get('model_type')!r}": hf.get("model_type") != "llama",
        f"RoPE scaling {rope_type!r}": rope_type != "default",
        "partial rotary embeddings": (rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1) != 1,
        "attention biases": bool(hf.get("attention_bias")),
        "MLP biases": bool(hf.get("mlp_bias")),
        f"activation {hf.get('hidden_act')!r}": hf.get("hidden_act", "silu") != "silu",
        "quantized weights": bool(hf.get("quantization_config")),
    }
    if dim and heads:
        unsupported[f"head size {hf.get('head_dim')} (dim / heads is {dim / heads:g})"] = (
            hf.get("head_dim") not in (None, dim // heads) or dim % heads != 0
        )
    found = [what for what, present in unsupported.items() if present]
    if found:
        raise ValueError(f"{folder}: not supported: {', '.join(found)}")
    return Config(
        vocab_size=hf["vocab_size"],
        dim=dim,
        n_layers=hf["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=hf.get("num_key_value_heads") or heads,
        hidden_dim=hf["intermediate_size"],
        max_len=hf.get("max_position_embeddings", 2048),
        rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0))),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )
