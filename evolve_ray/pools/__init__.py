"""Ray: joins a cluster, starts pools of actors, and dispatches the shards of a stage to them until each is committed.

In: a worker class, its options, the shards of a stage.
Out: committed shards, or one error that names stage and shard.
Never imports: the code that the workers run: engines, scorers, trainers.
"""
