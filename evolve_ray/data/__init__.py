"""Reads tables of prompts and preference triples, row by row.

In: JSONL, JSON, Parquet, or a `datasets` name or folder.
Out: rows of prompts and pairs, rejected rows, and all faults of a file at once.
Never imports: models, engines, or the configuration; column names come as arguments.
"""
