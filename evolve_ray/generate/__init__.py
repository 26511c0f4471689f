"""Generation of drafts: strategies run on vLLM engines, without a barrier between rounds.

In: the prompts of a shard, a strategy, a model folder.
Out: rows of drafts with their counts, committed by the worker.
Never imports: stages, or the code that selects drafts.
"""
