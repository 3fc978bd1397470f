"""Build the metrics that a config names."""

from collections.abc import Mapping, Sequence
from typing import Any

from core.closest import closest
from evaluation.metrics.metric import CaptionMetric, Metric
from launch.builders.components import build, target_of
from runtime.protocol import Processes


def require_metrics(sections: Mapping[str, Any], names: Sequence[str], has_captions: bool) -> None:
    """Raise ValueError, before anything is read for them, where ``names`` are not metrics that can be computed.

    ``sections`` are those of the metrics that there are; ``has_captions`` says whether images have captions.
    """
    if not names:
        raise ValueError(
            f"evaluation.metrics is empty; choose among {', '.join(sections)}, or set evaluate_every=null."
        )
    for name in names:
        if name not in sections:
            raise ValueError(
                f"There is no metric {name!r}{closest(name, sections)} The metrics are: {', '.join(sections)}."
            )
    of_captions = [name for name in dict.fromkeys(names) if _compares_captions(target_of(sections[name]))]
    if of_captions and not has_captions:
        raise ValueError(
            f"{of_captions[0]} compares images with their captions, but the images of this model have none; leave it "
            "out of metrics."
        )
    if len(of_captions) > 1:
        raise ValueError(
            f"{' and '.join(of_captions)} compare images with their captions, but an evaluation has one such metric; "
            "measure each by its own `ditscale evaluate`."
        )


def _compares_captions(target: Any) -> bool:
    """Return whether a config's ``_target_`` is a class of metrics of captions."""
    return isinstance(target, type) and issubclass(target, CaptionMetric)


def build_metrics(sections: Mapping[str, Any], names: Sequence[str], runtime: Processes) -> dict[str, Metric]:
    """Return the metrics by name, with their networks on the runtime's device."""
    metrics: dict[str, Metric] = {name: build(sections[name]) for name in names}
    for metric in metrics.values():
        if isinstance(metric, CaptionMetric):
            metric.scorer.to(runtime.device)
    return metrics
