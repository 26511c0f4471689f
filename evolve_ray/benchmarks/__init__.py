"""AlpacaEval 2 and Arena-Hard on what `jobs/evaluate.py` wrote.

In: committed answers, a reference and a judge behind the OpenAI protocol.
Out: win rates by model and round, in the formats of those benchmarks.
Never imports: an engine or a trainer: the answers are there already.
"""
