"""Model folders and names, and chat: messages to token ids and back.

In: a folder, a hub name, `RUN` or `RUN@2`; messages.
Out: checked folders with content hashes; token ids.
Never imports: engines or trainers.
"""
