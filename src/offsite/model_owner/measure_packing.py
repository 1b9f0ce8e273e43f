"""`pack --plan measure`: measures time and memory of one block on the calibration data, and discards the result."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from offsite.config import PackSpec
from offsite.kernels.peak_memory import peak_memory
from offsite.kernels.runtime import Runtime, resolve_runtime
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.block_runner import BlockRunner
from offsite.model_owner.bundle_settings import settings_files
from offsite.model_owner.bundle_tensors import DTYPES
from offsite.model_owner.calibration.calibration_batches import calibration_batches
from offsite.model_owner.calibration.calibration_text import row_form
from offsite.model_owner.check_bundle import open_settings
from offsite.model_owner.check_packing import Packing
from offsite.model_owner.emulator_work import work_of
from offsite.model_owner.heal.block_by_block import block_by_block
from offsite.model_owner.narrow.even_widths import even_widths
from offsite.model_owner.plan import PackPlan
from offsite.model_owner.sandwich import Sandwich
from offsite.models.plan_amounts import Measurement
from offsite.progress import Event, Progress, silent


def measure_packing(plan: PackPlan, checked: Packing, progress: Progress) -> PackPlan:
    """Measure a part of the packing, and add its time and memory to a plan.

    The measured part is to heal one block; if the settings heal no single blocks, to run one block on the calibration
    data. Distillation, search and the choice of widths by budget are not measured. The measurement's `what` names the
    measured and the other parts.

    Args:
        plan: the plan, from `plan_pack`.
        checked: the checked packing, from `plan_pack`.
        progress: receives the progress events.

    Returns:
        The plan with its measurement; unchanged if packing does not run the network.

    Raises:
        UsageError: the operating system does not report a process's memory use.
        DataError: the calibration text is too short.
        IncompatibleError: activations of the base are not finite, so no solution exists.
    """
    model, sandwich, spec = checked.model, checked.sandwich, checked.spec
    open_settings(model, settings_files(model, range(model.blocks), DTYPES[spec.dtype]))
    if not plan.work:
        return plan
    runtime = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    heals = work_of(sandwich.middle, spec).block_by_block
    progress(Event("measuring", 0))
    seconds: list[float] = []

    def run() -> None:
        batches = calibration_batches(model, spec.calibration.source, spec.calibration.tokens, row_form(spec))
        began = time.perf_counter()  # the run makes batches once, and not for every block
        if heals:
            _heal_one_block(model, sandwich, spec, batches)
        else:
            _run_one_block(model, runtime, batches)
        seconds.append(time.perf_counter() - began)

    _, peak = peak_memory(run, runtime.device)
    unmeasured = [step for step in plan.work if any(word in step for word in ("distill", "search", "budget"))]
    what = "healing one block" if heals else "running the calibration data through one block"
    return replace(
        plan,
        measured=Measurement(
            what=what + (f"; not measured: {', '.join(unmeasured)}" if unmeasured else ""),
            device=str(runtime.device),
            compute="fp32" if runtime.dtype.itemsize == 4 else "bf16",
            peak_bytes=peak,
            seconds=seconds[0],
            times=spec.kept(sandwich.middle) if heals else sandwich.middle[-1] + 1,
        ),
    )


def _heal_one_block(model: BaseModel, sandwich: Sandwich, spec: PackSpec, batches: Sequence[Tensor]) -> None:
    """Narrow, prune and heal block 0 as the settings say, as if the middle began there, and discard the result.

    If the settings drop blocks, the block also has to replace block 1.
    """
    dropped = spec.kept(sandwich.middle) < len(sandwich.middle)
    middle = (0, 1) if dropped else (0,)
    small = Sandwich(bottom=(), middle=middle, top=tuple(range(len(middle), model.blocks)))
    one = spec.changed({"keep": 1}) if spec.drops else spec
    with tempfile.TemporaryDirectory(prefix="offsite-plan-") as folder:
        widths = even_widths(model, (0,), spec) if spec.narrows else None
        block_by_block(model, small, (0,), one, Path(folder), silent, widths=widths, batches=batches)


def _run_one_block(model: BaseModel, runtime: Runtime, batches: Sequence[Tensor]) -> None:
    """Run the embedding and block 0 on all batches."""
    block = BlockRunner(model, runtime).load(0)
    hidden = [block.embed(ids.to(runtime.device)) for ids in batches]
    for position, ids in enumerate(batches):
        hidden[position] = block(ids.to(runtime.device), hidden[position])
