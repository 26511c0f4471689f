"""The run directory: rows, manifests, commits, shards, the lock, and its mirror in an object store.

In: rows and folders.
Out: committed folders that stay, or the fault of one with both hashes.
Never imports: anything of the package but `errors`.
"""
