"""Finds and checks models, and turns chat messages into token ids.

In: a model folder, a hub name, `RUN` or `RUN@2`; chat messages.
Out: checked model folders with content hashes; token ids.
Never imports: engines or trainers.
"""
