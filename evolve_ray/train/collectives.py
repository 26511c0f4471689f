"""What the ranks of a training group do together: sums, maxima, barriers."""

from typing import Any


class Collectives:
    """This rank's place in the process group that torch has joined; `device` is where its tensors are."""

    def __init__(self, device: Any):
        import torch

        self.torch, self.device = torch, device
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def all_reduce(self, values: Any) -> None:
        """Replaces each number of a tensor by its sum over all ranks."""
        moved = values.to(self.device)
        self.torch.distributed.all_reduce(moved)
        values.copy_(moved)

    def all_max(self, values: list[int]) -> list[int]:
        """The greatest over all ranks, number by number."""
        moved = self.torch.tensor(values, device=self.device)
        self.torch.distributed.all_reduce(moved, op=self.torch.distributed.ReduceOp.MAX)
        return moved.tolist()

    def barrier(self) -> None:
        self.torch.distributed.barrier()
