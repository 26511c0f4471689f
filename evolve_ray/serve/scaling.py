"""How many replicas there should be: as many as the running rounds need. Serve pickles this module, so it imports nothing."""

from typing import Any

METRIC = "running_rounds"


def by_rounds(context: Any) -> tuple[float, dict[str, Any]]:
    """(replicas wanted, no state of its own). A request counts with all its rounds that run at the same time.

    Serve applies its delays and bounds to the number.
    """
    rounds = sum((context.aggregated_metrics or {}).get(METRIC, {}).values()) + (context.total_queued_requests or 0.0)
    return rounds / context.config.get_target_ongoing_requests(), {}
