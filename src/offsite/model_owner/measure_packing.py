"""`pack --plan measure`: calibration data go through one block of the base, of which nothing is kept."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from offsite.config import PackSpec
from offsite.kernels.peak_memory import peak_memory
from offsite.kernels.runtime import Runtime, resolve_runtime
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.block_runner import BlockRunner
from offsite.model_owner.calibration import calibration_batches
from offsite.model_owner.check_packing import Packing
from offsite.model_owner.heal.block_by_block import block_by_block
from offsite.model_owner.plan import PackPlan
from offsite.model_owner.sandwich import Sandwich
from offsite.model_owner.work import work_of
from offsite.models.plan_value import Measurement
from offsite.progress import Event, Progress, silent


def measure_packing(plan: PackPlan, checked: Packing, spec: PackSpec, progress: Progress) -> PackPlan:
    """Heal one block of the base, or where none is healed run the calibration data through one; add what that took.

    Distillation and a search over selections are not measured: `what` of the measurement says what was.

    Args:
        plan: from `plan_pack`.
        checked: as well.
        spec: the settings.
        progress: where the events go.

    Returns:
        The plan; without a measurement where no network runs.

    Raises:
        UsageError: this system does not say what a process holds.
        DataError: the calibration text is too short.
        IncompatibleError: what goes through the base gives nothing that could be solved.
    """
    if not plan.work:
        return plan
    model, sandwich = checked.model, checked.sandwich
    runtime = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    heals = work_of(sandwich.middle, spec).block_by_block
    progress(Event("measuring", 0))
    seconds: list[float] = []

    def run() -> None:
        began = time.perf_counter()
        _heal_one_block(model, sandwich, spec) if heals else _run_one_block(model, spec, runtime)
        seconds.append(time.perf_counter() - began)

    _, peak = peak_memory(run, runtime.device)
    unmeasured = [step for step in plan.work if "distill" in step or "search" in step]
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


def _heal_one_block(model: BaseModel, sandwich: Sandwich, spec: PackSpec) -> None:
    """The first block, as if the middle began there; one more block is dropped where any is."""
    dropped = spec.kept(sandwich.middle) < len(sandwich.middle)
    middle = (0, 1) if dropped else (0,)
    small = Sandwich(bottom=(), middle=middle, top=tuple(range(len(middle), model.blocks)))
    one = spec.changed({"keep": 1}) if spec.select.keep is not None else spec
    with tempfile.TemporaryDirectory(prefix="offsite-plan-") as folder:
        block_by_block(model, small, (0,), one, Path(folder), silent)


def _run_one_block(model: BaseModel, spec: PackSpec, runtime: Runtime) -> None:
    batches = calibration_batches(model, spec.calibration.source, spec.calibration.tokens)
    block = BlockRunner(model, runtime).load(0)
    hidden = [block.embed(ids.to(runtime.device)) for ids in batches]
    for position, ids in enumerate(batches):
        hidden[position] = block(ids.to(runtime.device), hidden[position])
