"""The sentences at the end of a demo: what plug-in and emulator gained, and how much of the base was sent unchanged."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offsite.evaluation.row_scores import MetricName
    from offsite.study.demos.gains import Gains
    from offsite.study.metric import Metric

_OWNER_GETS = "what the model's owner gained without having seen the data"
_TUNER_HAS = "what the data owner has without the model's owner"


def gain_sentences(
    gains: "Gains", base_parameters: Mapping[str, float], metric_name: "MetricName", next_step: str
) -> list[str]:
    """Say what plug-in and tuned emulator gained over zero-shot, and how much of the base was sent unchanged.

    Shares of full fine-tuning's gain are given only if full fine-tuning was run and gained something.

    Args:
        gains: the gains over zero-shot.
        base_parameters: the shares of the base's parameters that were sent verbatim, compressed, and not at all.
        metric_name: the metric by which the models are compared.
        next_step: how to get full fine-tuning's score, as the end of a sentence.
    """
    from offsite.study.metric import METRICS

    metric = METRICS[metric_name]
    between = _gap(gains.plug_in - gains.emulator, metric)
    lines = [
        f"The plug-in is {_gap(gains.plug_in, metric)} zero-shot: {_OWNER_GETS}.",
        f"The tuned emulator is {_gap(gains.emulator, metric)} zero-shot: {_TUNER_HAS}.",
        f"The plug-in is {between} the tuned emulator: what the data owner does not have.",
    ]
    if gains.gain_recovered is not None and gains.own_gain is not None:
        lines += [
            f"Gain recovered: the plug-in has {100 * gains.gain_recovered:.0f} % of full fine-tuning's gain.",
            f"Emulator's own gain: the tuned emulator has {100 * gains.own_gain:.0f} % of it.",
        ]
    elif gains.full is not None:
        lines.append("Full fine-tuning did not gain over zero-shot, so there are no shares of its gain.")
    else:
        lines.append(f"Full fine-tuning was not run, so no share of its gain is known: {next_step}.")
    sent = {name: f"{100 * share:.1f} %" for name, share in base_parameters.items()}
    lines.append(
        f"Of the base's parameters, the bundle holds {sent['verbatim']} verbatim and {sent['compressed']} compressed; "
        f"{sent['not_sent']} were not sent."
    )
    return lines


def _gap(gain: float, metric: "Metric") -> str:
    """How far one model is from another in the metric's unit, by how much better it is."""
    size = f"{abs(metric.scale * gain):.{metric.places}f} {metric.difference}"
    better, worse = ("above", "below") if metric.higher_is_better else ("below", "above")
    return f"{size} {better}" if gain > 0 else f"NOT {better} ({size} {worse})"
