"""Makes a base with random weights in the shape of a published model, to measure speed and memory, not quality.

    python -m benchmarks.random_base gpt2-large TOKENIZER_FOLDER FOLDER

The shapes are GPT-2 large, and OPT-1.3B with 18 of its 24 blocks (see `benchmarks.cells`). The tokenizer is copied;
all its ids must be in the model's vocabulary.
"""

import shutil
import sys
from pathlib import Path

import torch


def main() -> None:
    """Write a base folder in the shape that the command line names; it appears only when it is complete."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, OPTConfig

    shapes = {
        "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
        "opt-1.3b, 18 blocks": OPTConfig(
            hidden_size=2048, ffn_dim=8192, num_hidden_layers=18, num_attention_heads=32, word_embed_proj_dim=2048
        ),
    }
    name, tokenizer, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.manual_seed(0)
    config, ends = shapes[name], AutoTokenizer.from_pretrained(tokenizer)
    config.bos_token_id, config.eos_token_id = ends.bos_token_id, ends.eos_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for file in tokenizer.iterdir():
        if "token" in file.name:
            shutil.copy(file, partial)
    partial.rename(folder)


if __name__ == "__main__":
    main()
