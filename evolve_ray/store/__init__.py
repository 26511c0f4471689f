"""The run directory: rows, manifests, commits, shards, the lock, and its mirror in an object store.

In: rows and folders.
Out: committed folders that are never changed, or an error that names a damaged file with both hashes.
Never imports: anything of the package except `errors`.
"""
