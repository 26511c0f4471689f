"""The arrows of the loop, a file each: what decides a stage, what it is made from, and what computes it.

In: a `Context` and the manifests of earlier stages.
Out: committed manifests: the same inputs give the same stage, which is never computed again.
Never imports: the commands; other rooms never import stages but commands and the story.
"""
