"""How a change of each block changes the base's loss, on the calibration data: gradients, and Fisher metrics.

For a block with output h (H,) of one token, and g the gradient of the next-token cross-entropy with respect to it, the
metric is the mean over tokens of |h|^2 g g^T. A change d of the output changes the loss, squared and on average, by
(d / |h|)^T M (d / |h|). Without a metric all directions of the hidden state, and all blocks, count equally. Together
with the inputs' Gram matrix it is the K-FAC approximation of the Hessian of an output projection (arXiv 1503.05671).
The gradients of output projections are means over tokens too.

Gradients are those of the base's loss on the text itself (the empirical Fisher information). They are computed block
by block: the inputs of all blocks are on disk, and one block is in memory at a time.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from offsite.config import PackSpec, RefitMap
from offsite.kernels.runtime import Runtime, resolve_runtime
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.block_runner import BlockRunner, LoadedBlock
from offsite.model_owner.calibration.calibration_batches import calibration_batches
from offsite.model_owner.calibration.calibration_text import row_form
from offsite.models.torch_tensors import read_tensor
from offsite.progress import Event, Progress
from offsite.storage.files import replace_file
from offsite.storage.safetensors_files import read_header

_TOKENS = 8192  # calibration tokens whose gradients are computed, unless the settings have fewer
_FILE = "loss-statistics.safetensors"
_STAGE = "measuring what the loss depends on"
_PARTS: tuple[RefitMap, ...] = ("attention", "mlp")


@dataclass(frozen=True)
class LossStatistics:
    """How the base's loss depends on one block; tensors are in float32."""

    metric: Tensor  # (H, H), by which changes of the block's output count
    gradients: Mapping[RefitMap, Tensor]  # (H, F) of the output projections, by the part of the block that each ends


def loss_statistics(
    model: BaseModel,
    blocks: Collection[int],
    spec: PackSpec,
    scratch: Path,
    progress: Progress,
    *,
    batches: Sequence[Tensor] | None = None,
) -> dict[int, LossStatistics]:
    """The statistics of each block, keyed by its base index. They are computed once and stored in `scratch`.

    Args:
        model: the opened base, a language model.
        blocks: base indices of the blocks.
        spec: the settings with the calibration data.
        scratch: a folder for the statistics, and for hidden states while they are computed.
        progress: receives the progress events.
        batches: token ids (B, T) to use instead of the calibration data of `spec`.

    Raises:
        DataError: the calibration text is unreadable or too short.
        StorageError: a file cannot be written.
    """
    file = scratch / _FILE
    machine = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    if not file.exists():
        if batches is None:
            tokens = min(_TOKENS, spec.calibration.tokens)
            batches = calibration_batches(model, spec.calibration.source, tokens, row_form(spec))
        found = _measure(model, min(blocks), batches, machine, scratch, progress)
        replace_file(file, save({name: tensor.cpu() for name, tensor in found.items()}))
    held = read_header(file)

    def read(name: str) -> Tensor:
        return read_tensor(held[name]).to(machine.device)

    return {
        index: LossStatistics(
            read(f"{index}.metric"),
            {part: read(f"{index}.{part}") for part in _PARTS if f"{index}.{part}" in held},
        )
        for index in blocks
    }


def _measure(
    model: BaseModel, lowest: int, batches: Sequence[Tensor], machine: Runtime, scratch: Path, progress: Progress
) -> dict[str, Tensor]:
    """Compute the statistics of all blocks from the index `lowest` on, from the last one down; keys are file names."""
    runner, last = BlockRunner(model, machine), model.blocks - 1
    batches = [ids.to(machine.device) for ids in batches]
    inputs = partial(_InputFile, scratch)
    hidden = [runner.load(0).embed(ids) for ids in batches]
    steps = 2 * model.blocks - lowest
    for index in range(model.blocks):
        progress(Event(_STAGE, index, steps))
        if index >= lowest:
            inputs(index).write(hidden)
        block = runner.load(index)
        hidden = [block(ids, hidden[position]) for position, ids in enumerate(batches)]
    gradients = _loss_gradients(runner, last, batches, inputs(last))
    tokens = sum(ids.numel() for ids in batches)
    found: dict[str, Tensor] = {}
    for index in range(last, lowest - 1, -1):
        progress(Event(_STAGE, model.blocks + last - index, steps))
        block = runner.load(index)
        weights = _output_weights(model, index, block)
        totals: dict[str, Tensor] = {}
        for position, ids in enumerate(batches):
            entered = inputs(index).read(position).to(machine.device).requires_grad_()
            output, gradient = block.differentiable(ids, entered), gradients[position]
            sizes = output.detach().norm(dim=-1, keepdim=True)
            scaled = (gradient * sizes).flatten(0, -2)  # (B * T, H)
            gradients[position], *of_weights = torch.autograd.grad(output, [entered, *weights.values()], gradient)
            added = [scaled.T @ scaled, *of_weights]
            names = ("metric", *weights)
            totals = {name: totals[name] + value if totals else value for name, value in zip(names, added, strict=True)}
        for name, total in totals.items():
            turned = total.T if name != "metric" and model.family.transposed else total
            found[f"{index}.{name}"] = (turned / tokens).contiguous()
        inputs(index).delete()
    return found


def _output_weights(model: BaseModel, index: int, block: LoadedBlock) -> dict[RefitMap, Tensor]:
    """The weights of a block's output projections, by part, which get gradients from now on.

    A mixture of experts has no projection of its MLP.

    Args:
        model: the opened base.
        index: the block's index in the base.
        block: the loaded block.
    """
    family, parameters = model.family, dict(block.module.named_parameters())
    paths: dict[RefitMap, str] = {part: f"{family.output_of(part)[0]}.weight" for part in _PARTS}
    held = {part: path for part, path in paths.items() if path in model.block(index)}
    return {part: parameters[family.modules.get(path, path)].requires_grad_() for part, path in held.items()}


def _loss_gradients(runner: BlockRunner, last: int, batches: Sequence[Tensor], inputs: "_InputFile") -> list[Tensor]:
    """The gradients of the loss, summed over each batch's tokens, with respect to the last block's output, (B, T, H).

    Args:
        runner: loads the last block with final norm and head.
        last: the last block's index in the base.
        batches: token ids (B, T).
        inputs: the states that enter the last block.
    """
    top, found = runner.stack([last], (), {}, whole=True), list[Tensor]()
    device = next(iter(top.parameters.values())).device
    for position, ids in enumerate(batches):
        output, nats = top.to_the_end(ids, inputs.read(position).to(device).requires_grad_())
        found += torch.autograd.grad(nats * (ids.numel() - len(ids)), [output])
    return [gradient.float() for gradient in found]


class _InputFile:
    """The file with the hidden states that enter one block, a tensor (B, T, H) for each batch.

    Args:
        folder: the folder of the file.
        index: the block's index in the base.
    """

    def __init__(self, folder: Path, index: int) -> None:
        self._file = folder / f"enters-{index}.safetensors"

    def write(self, states: Sequence[Tensor]) -> None:
        """Write the states of all batches, in bfloat16."""
        replace_file(self._file, save({str(i): state.bfloat16().cpu() for i, state in enumerate(states)}))

    def read(self, position: int) -> Tensor:
        """Read the states of the batch with this index, in float32."""
        return read_tensor(read_header(self._file)[str(position)], torch.float32)

    def delete(self) -> None:
        """Delete the file."""
        self._file.unlink(missing_ok=True)
