"""What a run measures (the meter), what it comes to (totals) and where the numbers go (the sinks). docs/metrics.md defines every name."""

from tunesmith.metrics.meter import CardSensors, Meter, Rate
from tunesmith.metrics.sinks import Sinks, hand_over_again, open_sinks, opened_by_agent, read_metrics
from tunesmith.metrics.totals import totals

__all__ = ["CardSensors", "Meter", "Rate", "Sinks", "hand_over_again", "open_sinks", "opened_by_agent", "read_metrics", "totals"]
