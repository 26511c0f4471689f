"""Runs AlpacaEval 2 and Arena-Hard on the answers that `jobs/evaluate.py` committed.

In: committed answers, a reference, and a judge behind the OpenAI API.
Out: win rates by model and round, in the file formats of these benchmarks.
Never imports: an engine or a trainer, because the answers are generated already.
"""
