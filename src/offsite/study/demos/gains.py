"""What the models of a demo gain over zero-shot, and which share of full fine-tuning's gain that is."""

from collections.abc import Mapping
from dataclasses import dataclass

from offsite.evaluation.row_scores import MetricName
from offsite.study.metric import METRICS


@dataclass(frozen=True)
class Gains:
    """Gains over zero-shot in the unit of the scores, above 0 where the model is better.

    The shares are None if full fine-tuning was not run, or gained nothing.
    """

    plug_in: float
    emulator: float  # tuned: what the data owner has without the model's owner
    full: float | None  # None if full fine-tuning was not run
    gain_recovered: float | None  # plug_in / full
    own_gain: float | None  # emulator / full


def gains_over_zero_shot(scores: Mapping[str, float], metric: MetricName) -> Gains:
    """Compare the models of a demo with zero-shot.

    Args:
        scores: the score of each model, keyed by its name, such as "plug-in"; "full fine-tuning" may be missing.
        metric: the metric of the scores.
    """
    sign = 1.0 if METRICS[metric].higher_is_better else -1.0
    gains = {row: sign * (score - scores["zero-shot"]) for row, score in scores.items()}
    full = gains.get("full fine-tuning")
    shares = {row: gains[row] / full if full is not None and full > 0 else None for row in ("plug-in", "emulator")}
    return Gains(gains["plug-in"], gains["emulator"], full, shares["plug-in"], shares["emulator"])
