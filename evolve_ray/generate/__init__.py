"""Drafts: strategies driven on vLLM engines, without a barrier between rounds.

In: prompts of a shard, a strategy, a model folder.
Out: rows of drafts with their counts, committed by the worker.
Never imports: stages, or how drafts are scored and selected.
"""
