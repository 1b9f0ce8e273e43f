"""Runs tasks of lm-evaluation-harness on a base, a bundle, a plug-in or an adapter (needs the extra `lm-eval`).

The model is loaded as in `evaluate` and passed to the harness as an object. There is one difference from running the
harness alone: every request starts with exactly one BOS token if the tokenizer has one, as in tuning and `evaluate`.
The harness leaves this to the tokenizer, and many tokenizers (GPT-2's, SmolLM2's) add no BOS.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offsite.config import EvalSpec
from offsite.errors import UsageError
from offsite.evaluation.evaluate import load_tuned
from offsite.evaluation.lineage import require_lineage
from offsite.extras import require
from offsite.kernels.runtime import resolve_runtime
from offsite.models.hugging_face_calls import LIBRARY_ERRORS, quiet
from offsite.models.tokenizers import context_length, load_tokenizer
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base, Bundle, PlugIn, Return, files_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXTRA = "lm-eval"
_PURPOSE = "running tasks of lm-evaluation-harness"
_RESAMPLES = 1000  # bootstrap resamples of the harness, for metrics whose standard error has no closed form


@dataclass(frozen=True)
class TaskScore:
    """The harness's result for one task: every metric and its standard error, under the harness's names."""

    task: str
    rows: int
    metrics: Mapping[str, float]


def run_tasks(
    model: Path | Base | Bundle | PlugIn,
    tasks: Sequence[str],
    spec: EvalSpec,
    *,
    adapter: Path | Return | PlugIn | None = None,
    tasks_path: Path | None = None,
    progress: Progress = silent,
) -> list[TaskScore]:
    """Run tasks of lm-evaluation-harness, and return their metrics.

    This code downloads nothing. The harness reads the rows of a task from the place that the task's file names.

    Args:
        model: a base, a bundle or a merged plug-in, or the folder of one.
        tasks: names or patterns of tasks, groups or tags.
        spec: the settings of the evaluation: device, dtype, and `max_rows` for each task. As many requests run at once
            as micro_batch_tokens / max_length; a request is cut only if it is longer than the model's context.
        adapter: the adapter that was tuned on that model: a return, or a plug-in saved as an adapter. None: the model
            is scored alone.
        tasks_path: a folder with additional task files, or None; they may run Python code, so use only files that you
            trust.
        progress: receives the progress events.

    Raises:
        UsageError: the harness is not installed, or a task is unknown or does not run.
        StorageError: a file is missing or broken.
        IncompatibleError: the folder is not a plain checkpoint, or the adapter does not fit it.
    """
    results = harness_results(model, tasks, spec, adapter=adapter, tasks_path=tasks_path, progress=progress)
    counts = results.get("n-samples", {})
    return [
        TaskScore(name, int(counts.get(name, {}).get("effective", 0)), _metrics(found))
        for name, found in results["results"].items()
    ]


def harness_results(
    model: Path | Base | Bundle | PlugIn,
    tasks: Sequence[str],
    spec: EvalSpec,
    *,
    adapter: Path | Return | PlugIn | None = None,
    tasks_path: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness, and return the harness's own result dictionary, including samples.

    Arguments as for `run_tasks`.
    """
    lm_eval = require("lm_eval", _EXTRA, _PURPOSE)
    wrapper = require("lm_eval.models.huggingface", _EXTRA, _PURPOSE).HFLM
    manager = _open_task_index(tasks, tasks_path)
    require_lineage(model, adapter)
    runtime = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    source = files_of(model)
    tokenizer = load_tokenizer(source)
    longest = context_length(source) or spec.max_length
    loaded = load_tuned(source, files_of(adapter) if adapter else None, runtime)
    progress(Event("running tasks", 0))
    with quiet(), _task_errors(tasks):
        harness_model = wrapper(
            pretrained=loaded,
            tokenizer=_prepend_bos(tokenizer),
            backend="causal",
            max_length=longest,
            batch_size=max(1, spec.micro_batch_tokens // min(longest, spec.max_length)),
            softmax_dtype=torch.float32,  # as in offsite.kernels.fused_loss
            add_bos_token=tokenizer.bos_token_id is not None,
        )
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model=harness_model,
            tasks=manager.match_tasks(list(tasks)),
            task_manager=manager,
            limit=spec.max_rows,
            bootstrap_iters=_RESAMPLES,
            log_samples=True,
        )
    return results


def _open_task_index(tasks: Sequence[str], tasks_path: Path | None) -> Any:
    """Open the harness's index of tasks, and check that each of `tasks` matches something in it.

    Raises:
        UsageError: a task is unknown, or there is no folder `tasks_path`.
    """
    if tasks_path is not None and not tasks_path.is_dir():
        raise UsageError(f"there is no folder {tasks_path}", next_step="name the folder of your task files")
    kind = require("lm_eval.tasks", _EXTRA, _PURPOSE).TaskManager
    with quiet(), _task_errors(tasks):
        manager = kind(include_path=str(tasks_path) if tasks_path else None)
        unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown or not tasks:
        raise UsageError(
            f"lm-evaluation-harness has no such task: {', '.join(unknown) or '(none named)'}",
            next_step="`lm-eval ls tasks` lists its own; --tasks-path DIR adds yours",
        )
    return manager


class _task_errors:  # noqa: N801
    """Context manager: turns exceptions of the harness and its libraries into a UsageError."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tasks

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        library_errors = (
            *LIBRARY_ERRORS,
            require("yaml", _EXTRA, _PURPOSE).YAMLError,
            require("datasets.exceptions", _EXTRA, _PURPOSE).DatasetsError,
        )
        if isinstance(error, library_errors):
            raise UsageError(
                f"lm-evaluation-harness could not run {', '.join(self._tasks)}",
                reasons=[f"{type(error).__name__}: {str(error).strip()[:500]}"],
                next_step="check the task's file, and that its rows are on this machine",
            ) from error


def _prepend_bos(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Change the tokenizer so that it adds its BOS token (if it has one) at the start, and nothing else; returns it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.bos_token_id is None:
        return tokenizer
    from tokenizers.processors import TemplateProcessing

    token = str(tokenizer.bos_token)
    backend.post_processor = TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", "$B"], special_tokens=[(token, tokenizer.bos_token_id)]
    )
    return tokenizer


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """The numeric metrics of a task. "acc,none" becomes "acc"; the name of any other filter is not removed."""
    named = {name.removesuffix(",none"): value for name, value in found.items() if name != "sample_len"}
    return {name: float(value) for name, value in named.items() if isinstance(value, int | float)}
