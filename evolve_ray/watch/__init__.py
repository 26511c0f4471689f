"""Looking at a run from outside: trackers, Prometheus metrics, status, the pulse of the cluster, the terminal.

In: events and committed stages.
Out: points, gauges and lines; a failing tracker ends no run.
Never imports: what it looks at: no stage, engine or trainer.
"""
