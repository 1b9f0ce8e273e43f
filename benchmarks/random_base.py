"""A base with random weights in a published shape, and a tokenizer whose ids fit: for speed and memory, not quality.

python -m benchmarks.random_base gpt2-large TOKENIZER_FOLDER FOLDER
"""

import shutil
import sys
from pathlib import Path

import torch


def main() -> None:
    """Write the folder."""
    from transformers import AutoModelForCausalLM, GPT2Config

    shapes = {"gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20)}
    name, tokenizer, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shapes[name], dtype=torch.bfloat16)
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for file in tokenizer.iterdir():
        if "token" in file.name:
            shutil.copy(file, partial)
    partial.rename(folder)


if __name__ == "__main__":
    main()
