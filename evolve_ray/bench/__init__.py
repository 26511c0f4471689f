"""Measures speed and memory: both sides of each claim in one process, in turns. One file per subcommand.

In: sizes and repeats from the command line.
Out: rows with median, range and counts.
Never imports: a test, or a fast path of its own, because it measures what users run.
"""
