"""Ray: joining a cluster, pools of actors, and shards dispatched to them until each is committed.

In: a worker class, its options, the shards of a stage.
Out: committed shards, or one error that names stage and shard.
Never imports: what the workers do: engines, scorers, trainers.
"""
