"""The order of the images of an epoch, from any batch on."""

from collections.abc import Iterator

import numpy as np
from mmengine.dataset import DefaultSampler
from mmengine.dist import get_dist_info
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, Sampler

from .images import Draw


class EpochSampler(Sampler[Draw]):
    """Images of one process in random order, with the seed of each image's augmentation.

    Order and seeds follow from the seed of the recipe, the epoch and the place in the epoch. The place counts over all
    processes, so neither the number of loader workers nor, up to the rounding of an epoch, that of processes matters.
    """

    def __init__(self, dataset: Dataset, seed: int, batch_size: int, repeats: int = 1) -> None:
        self.rank, self.processes = get_dist_info()
        self.order = (
            RepeatAugSampler(dataset, self.processes, self.rank, num_repeats=repeats)
            if repeats > 1
            else DefaultSampler(dataset, shuffle=True, seed=0)
        )
        self.seed = seed
        self.batch_size = batch_size
        self.first_batch = 0  # batches before it are left out
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.order.set_epoch(int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]))

    def __iter__(self) -> Iterator[Draw]:
        for place, index in enumerate(self.order):
            if place >= self.first_batch * self.batch_size:
                yield Draw(int(index), (self.seed, self.epoch, place * self.processes + self.rank))

    def __len__(self) -> int:
        """Return the images of a whole epoch, whatever the first batch is."""
        return len(self.order)
