"""The claims of the method, tested on the tiny world: recipes x seeds, with paired intervals.

In: finished runs.
Out: study.json, STUDY.md and a figure that show which claims hold.
Never imports: engines or trainers; each run is a command of its own.
"""
