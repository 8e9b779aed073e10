"""Train the shipped checkpoints: python -m tinylm.pretrain shakespeare-800k shakespeare-30k

Interrupted, it goes on where it was. The result goes to labs/tinylm/assets/checkpoints/ unless --out names a folder.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from tinylm import checkpoint
from tinylm.data import VALIDATION_PLAYS, VOCAB_SIZE, encode, shakespeare
from tinylm.device import default_device, describe
from tinylm.model import Config, TinyLlama
from tinylm.train import TrainConfig, evaluate, train

RECIPES = {
    "shakespeare-800k": (
        Config(VOCAB_SIZE, dim=128, n_layers=4, n_heads=4, hidden_dim=384),
        TrainConfig(tokens=24_000_000, batch_size=16, seq_len=256, lr=4e-3, eval_every=250),
    ),
    "shakespeare-30k": (
        Config(VOCAB_SIZE, dim=32, n_layers=2, n_heads=2, hidden_dim=96),
        TrainConfig(tokens=40_000_000, batch_size=16, seq_len=256, lr=1e-2, eval_every=500),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, default=checkpoint.SHIPPED)
    arguments = parser.parse_args()
    corpus = shakespeare()
    for name in arguments.names:
        config, recipe = RECIPES[name]
        torch.manual_seed(recipe.seed)
        model = TinyLlama(config).to(default_device())
        state = arguments.out / f".{name}.state.safetensors"
        history = train(model, corpus.train_tokens, recipe, val=corpus.val_tokens, checkpoint=state, compile=True)
        card = {
            "name": name,
            "command": f"python -m tinylm.pretrain {name}",
            "data": {"corpus": corpus.name, "sha256": corpus.sha256, "held_out": list(VALIDATION_PLAYS)},
            "train": asdict(recipe),
            "val_loss": evaluate(model, corpus.val_tokens),
            "val_loss_unit": f"nats per character, all validation text, windows of {config.max_len} without overlap",
            "val_loss_by_play": {play: evaluate(model, encode(corpus.val[play])) for play in VALIDATION_PLAYS},
            "train_loss": evaluate(model, corpus.train_tokens, limit=1000),
            "curve": history.val,
            "tokens": history.tokens,
            "flops": history.flops,
            "seconds": round(history.seconds),
            "machine": describe(),
            "license": "CC0-1.0",
        }
        checkpoint.save(model, arguments.out / name, card)
        state.unlink(missing_ok=True)
        print(f"{name}: {card['val_loss']:.4f} {card['val_loss_unit']}; {card['seconds']} s")


if __name__ == "__main__":
    main()
