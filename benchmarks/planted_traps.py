"""Plants a trap in a bundle, as a hostile model owner could, and reads it out of a return.

The trap asks: which of some words stood in the private rows? In the first block, one neuron for each word gets a
threshold that only this word passes. For every other token the neuron is silent, so its gradient is zero; its trained
weights differ from the sent ones if and only if the word was in the rows. The idea is that of "Robbing the Fed"
(arXiv 2110.13057) and "Decepticons" (arXiv 2201.12675), here with ordinary weights of the architecture.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from artifacts import edit_bundle_weights, sign_again
from offsite.data_owner.audit_traps.activity import token_sample
from offsite.models.loading import load_model
from offsite.protocol.artifacts import Bundle, Return
from offsite.protocol.signing import Identity
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.safetensors_files import read_float32, read_header

Variant = Literal["threshold", "spread", "behind a norm", "attention"]
VARIANTS: tuple[Variant, ...] = ("threshold", "spread", "behind a norm", "attention")
_SILENT = -40.0  # what the input of a neuron should be at most, for 99.5 % of other tokens
_CONSTANT = 4.0  # the value of the constant channel, in units of the embeddings' RMS
_MIXING = 0.1  # the share of attention's output that is left in block 0
_STEPS = 250  # of the optimiser that finds the rows


@dataclass(frozen=True)
class Places:
    """Where a family keeps what the trap changes: names in block 0, and how matrices are stored."""

    into: str  # the matrix whose rows get the thresholds
    out: str  # the last matrix of the MLP
    value: str  # the matrix of attention's values
    mixing: str  # the last matrix of attention, which mixes other tokens into what the neurons read
    norm: str  # the norm in front of the MLP
    beside: tuple[str, ...]  # further matrices that read the same norm
    transposed: bool = False


PLACES = {
    "llama": Places(
        "mlp.gate_proj",
        "mlp.down_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "post_attention_layernorm",
        ("mlp.up_proj",),
    ),
    "gpt2": Places("mlp.c_fc", "mlp.c_proj", "attn.c_attn", "attn.c_proj", "ln_2", (), transposed=True),
}
PLACES["qwen3"] = PLACES["llama"]


def plant(
    bundle: Bundle, owner: Identity, words: Sequence[int], variant: Variant = "threshold", strength: float = 1.0,
    seed: int = 0,
) -> Path:  # fmt: skip
    """Change block 0 of a bundle so that a return shows which of `words` (token ids) were trained on; sign it again.

    Args:
        bundle: an honest bundle, whose folder is changed.
        owner: the hostile owner's identity.
        words: token ids, at most one for each neuron.
        variant: "spread" gives each word two noisy neurons, "behind a norm" moves the scale into the norm's weights,
            and "attention" uses rows of the values, which have no threshold.
        strength: scales the planted rows.
        seed: of the contexts and the noise.
    """
    family = bundle.manifest.family
    places = PLACES[family.model_type]
    embedding = next(iter(family.embeddings))
    mixing = f"{family.in_block(0, places.mixing)}.weight"
    edit_bundle_weights(bundle.folder, partial(_prepare, embedding=embedding, mixing=mixing, biased=places.transposed))
    inputs, ids = _inputs(bundle, places, words, seed, attention=variant == "attention")
    rows, biases = _threshold_rows(inputs, ids, words, places.transposed, seed, attention=variant == "attention")
    draw = np.random.default_rng(seed)
    block = family.in_block(0, "")

    def change(tensors: dict[str, np.ndarray]) -> None:
        def rows_of(path: str) -> np.ndarray:
            matrix = tensors[f"{block}{path}.weight"]
            return matrix.T if places.transposed else matrix  # a view: what is written there is written to the bundle

        if variant == "behind a norm":
            dims = draw.permutation(rows.shape[1])[::2]
            tensors[f"{block}{places.norm}.weight"][dims] *= 8
            if f"{block}{places.norm}.bias" in tensors:
                tensors[f"{block}{places.norm}.bias"][dims] *= 8
            for path in (places.into, *places.beside):
                rows_of(path)[:, dims] /= 8
            rows[:, dims] /= 8
        if variant == "attention":
            values = rows_of(places.value)
            first = len(values) - len(values) // 3 if places.transposed else 0  # queries, keys, values in one matrix
            usual = np.median(np.linalg.norm(values[first:], axis=1))
            values[first : first + len(words)] = (
                rows[: len(values) - first] * usual / np.median(np.linalg.norm(rows, axis=1))
            )
            return
        into, copies = rows_of(places.into), copies_of(variant)
        for copy in range(copies):
            noise = draw.standard_normal(rows.shape).astype(np.float32) if copies > 1 else 0.0
            planted = rows + noise * 0.02 * np.linalg.norm(rows, axis=1, keepdims=True)
            into[copy * len(words) : (copy + 1) * len(words)] = strength * planted
            if places.transposed:
                tensors[f"{block}{places.into}.bias"][copy * len(words) : (copy + 1) * len(words)] = strength * biases

    edit_bundle_weights(bundle.folder, change)
    sign_again(bundle.folder, owner)
    return bundle.folder


def _prepare(tensors: dict[str, np.ndarray], embedding: str, mixing: str, *, biased: bool) -> None:
    """Make the word easy to read for the neurons: attention mixes little into it, and there is a constant channel.

    Without biases, a threshold needs a channel of the embeddings that has the same value for all tokens.
    """
    tensors[mixing] *= _MIXING
    if not biased:
        matrix = tensors[embedding]
        matrix[:, int(np.abs(matrix).mean(axis=0).argmin())] = _CONSTANT * np.sqrt(np.mean(matrix**2))


def copies_of(variant: str) -> int:
    """How many neurons each word has."""
    return 2 if variant == "spread" else 1


@torch.no_grad()
def _inputs(
    bundle: Bundle, places: Places, words: Sequence[int], seed: int, *, attention: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the planted rows will read, (N, H), for N tokens in random contexts, and their ids; a third are words."""
    model = load_model(bundle.folder, dtype=torch.float32, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    ids = token_sample(model, 6_144, generator)
    swap = torch.rand(ids.shape, generator=generator) < 0.33
    ids[swap] = torch.tensor(words)[torch.randint(len(words), (int(swap.sum()),), generator=generator)]
    seen: list[torch.Tensor] = []
    block: Any = model.get_submodule(bundle.manifest.family.blocks)[0]
    layer = block.get_submodule(places.value if attention else places.into)
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    cut: Any = model.get_submodule(bundle.manifest.family.blocks)
    del cut[1:]  # only the first block is of interest
    for part in ids.split(64):
        model.base_model(input_ids=part, use_cache=False)
    handle.remove()
    return torch.cat(seen), ids.flatten()


def _threshold_rows(
    inputs: torch.Tensor, ids: torch.Tensor, words: Sequence[int], biased: bool, seed: int, *, attention: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (W, H) and biases (W,) that separate each word from all other tokens by a margin, scaled to be silent.

    Rows of attention have no threshold, so they are only scaled like the others.
    """
    columns = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1) if biased and not attention else inputs
    values, vectors = torch.linalg.eigh((columns.T @ columns / len(columns)).double())
    whitening = (vectors / values.clamp_min(1e-6 * values[-1]).sqrt()).float()  # the optimiser needs equal scales
    columns = columns @ whitening
    hits = ids[:, None] == torch.tensor(words)[None]  # (N, W)
    share = hits.float().mean(dim=0)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(len(words), columns.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([rows], lr=0.05)
    with torch.enable_grad():
        for _ in range(_STEPS):
            part = torch.randint(len(columns), (2048,), generator=generator)
            answers, mine = columns[part] @ rows.T, hits[part]  # (n, W)
            loss = torch.relu(1 + answers)[~mine].mean() + (torch.relu(1 - answers) * mine / share).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    solved = rows.detach()
    answers = columns @ solved.T
    least = [answers[~hits[:, word], word].quantile(0.995).clamp_max(-0.05) for word in range(len(words))]
    solved = (solved * (_SILENT / torch.stack(least))[:, None]) @ whitening.T
    return solved[:, : inputs.shape[1]].numpy().copy(), solved[:, -1].numpy().copy()


def read_out(
    bundle: Path, returned: Return, model_type: str, words: Sequence[int], variant: Variant, block: str
) -> np.ndarray:
    """The trap's answer from a return: for each word a score, (W,), larger if it was trained on.

    Args:
        bundle: the folder of the trapped bundle.
        returned: the return that was tuned on it.
        model_type: the family's model type.
        words: the token ids of the trap.
        variant: how it was planted.
        block: the name of block 0 in files, with a dot at its end.
    """
    places = PLACES[model_type]
    path = places.value if variant == "attention" else places.into
    change = _change(bundle, returned, f"{block}{path}", places.transposed)
    if variant == "attention":
        start = len(change) - len(change) // 3 if places.transposed else 0
        return np.linalg.norm(change[start : start + len(words)], axis=1)
    count = len(words)
    norms = [np.linalg.norm(change[n * count : (n + 1) * count], axis=1) for n in range(copies_of(variant))]
    return np.mean(norms, axis=0)


def _change(bundle: Path, returned: Return, layer: str, transposed: bool) -> np.ndarray:
    """The change of a layer's weight in a return, (outputs, inputs): B A of LoRA, or the difference of the weights."""
    if returned.manifest.lora is not None:
        held = read_header(returned.folder / "adapter_model.safetensors")
        pairs = {name: read_float32(one) for name, one in held.items() if f".{layer}." in f".{name}"}
        a = next(one for name, one in pairs.items() if "lora_A" in name)
        b = next(one for name, one in pairs.items() if "lora_B" in name)
        return b @ a
    after = read_float32(read_header(returned.folder / "adapter.safetensors")[f"{layer}.weight"])
    before = read_float32(open_checkpoint(bundle).tensors[f"{layer}.weight"])
    return (after - before).T if transposed else after - before


def right_share(scores: np.ndarray, present: Sequence[bool]) -> float:
    """The share of words that the trap gets right, if it says "present" for as many as were; 0.5 is chance."""
    count = sum(present)
    chosen = set(np.argsort(-scores, kind="stable")[:count].tolist())
    return float(np.mean([(place in chosen) == there for place, there in enumerate(present)]))


Settings = Mapping[str, Any]
