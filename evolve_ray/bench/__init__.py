"""How fast it is: both sides of each claim measured in one process, in turns. One subcommand of `jobs/bench.py` a file.

In: sizes and repeats from the command line.
Out: rows with median, range and counts.
Never imports: a test, or a fast path of its own: it measures what users run.
"""
