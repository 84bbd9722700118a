"""MLflow's system metrics (memory, load, GPU), logged through the run's journal like its other metrics."""

import logging
import time
from collections.abc import Callable, Mapping

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

log = logging.getLogger(__name__)

_SECONDS = 5.0  # seconds between samples; MLflow's default of 10 is too long for short runs


class Sampler(SystemMetricsMonitor):  # type: ignore[misc]
    """A monitor that samples the machine's metrics from a thread and writes them to the journal.

    MLflow's own monitor sends them itself, and stops for good at the first error of a server. This class relies on
    private attributes of that monitor (``_shutdown_event``, ``_logging_step``, ``_metrics_prefix``): check them first
    when MLflow is updated.
    """

    def __init__(self, run_id: str, resumed: bool, write: Callable[[Mapping[str, float], int, int], object]) -> None:
        """Prepare the monitor; ``write`` takes metrics, step, and time in milliseconds since 1970."""
        super().__init__(run_id, sampling_interval=_SECONDS, samples_before_logging=1, resume_logging=resumed)
        self._write = write

    def monitor(self) -> None:
        """Take and log samples until :meth:`finish` is called."""
        while True:
            self.collect_metrics()
            if self._shutdown_event.wait(self.sampling_interval):
                return
            try:
                self.publish_metrics(self.aggregate_metrics())
            except Exception as error:  # a full disk, or a local store that fails: the run itself reports it
                log.debug("no samples of the machine any more: %s", error)
                return

    def publish_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log a sample under the names that MLflow's web page shows as system metrics."""
        values = {f"{self._metrics_prefix}{name}": value for name, value in metrics.items()}
        self._write(values, self._logging_step, time.time_ns() // 1_000_000)
        self._logging_step += 1
        for monitor in self.monitors:
            monitor.clear_metrics()
