"""Serves refined answers: an endpoint with OpenAI's protocol, on Ray Serve.

In: a model folder or a run, a recipe, requests over HTTP.
Out: answers, the drafts on the way to them, metrics.
Never imports: training, or another command.
"""
