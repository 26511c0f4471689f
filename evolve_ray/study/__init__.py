"""The claims of the method on the tiny world: recipes x seeds, with paired intervals.

In: finished runs.
Out: study.json, STUDY.md and a figure: which claims were reached.
Never imports: engines or trainers: each run is a command.
"""
