"""Shows a run from outside: trackers, Prometheus metrics, status, a check that the cluster is alive, the terminal.

In: events and committed stages.
Out: points, gauges and lines; a tracker that fails does not stop the run.
Never imports: the code that it watches: stages, engines, trainers.
"""
