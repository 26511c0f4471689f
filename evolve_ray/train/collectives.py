"""Collective operations of the ranks of a worker group: sums, maxima, barriers."""

from typing import Any


class Collectives:
    """The collective operations of this rank, in torch's default process group; its tensors are on `device`."""

    def __init__(self, device: Any):
        import torch

        self.torch, self.device = torch, device
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def all_reduce(self, values: Any) -> None:
        """Replaces each number of a tensor by its sum over all ranks."""
        on_device = values.to(self.device)
        self.torch.distributed.all_reduce(on_device)
        values.copy_(on_device)

    def all_max(self, values: list[Any]) -> list[Any]:
        """The maximum over all ranks, for each number of the list."""
        on_device = self.torch.tensor(values, device=self.device)
        self.torch.distributed.all_reduce(on_device, op=self.torch.distributed.ReduceOp.MAX)
        return on_device.tolist()

    def barrier(self) -> None:
        self.torch.distributed.barrier()
