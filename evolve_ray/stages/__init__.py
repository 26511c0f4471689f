"""The stages of the main loop, one file each: what goes into the stage key, which inputs a stage has, and how it is computed.

In: a `Context` and the manifests of earlier stages.
Out: the manifests of committed stages. A stage that is committed for the same inputs is never computed again.
Never imports: the commands. Only the commands and the main loop (`iterate.py`) import stages.
"""
