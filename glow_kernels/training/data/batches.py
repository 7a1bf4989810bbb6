"""The order in which a run uses its images."""

from collections.abc import Mapping

import torch
from torch import Tensor

from glow_kernels.errors import CheckpointError, UsageError


class BatchSampler:
    """Shuffled, endless mini-batch indices whose state can be saved and restored exactly.

    Each epoch is a fresh permutation; an incomplete batch at its end is dropped. If there are fewer images than
    ``batch_size``, each batch is all of them.

    Args:
        size: Number of images.
        batch_size: Number of indices in a batch.
        seed: Determines every batch, together with ``size`` and ``batch_size``.

    Attributes:
        epoch: The epoch, from 0, of the batch that :meth:`next` returned last.

    Raises:
        UsageError: ``size`` or ``batch_size`` is less than 1.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        for name, value in (("size", size), ("batch_size", batch_size)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        self.epoch = 0
        self._size = size
        self._batch_size = min(size, batch_size)
        self._generator = torch.Generator().manual_seed(seed)
        self._begin_epoch()

    def next(self) -> Tensor:
        """The next batch: indices, int64 of shape (min(size, batch_size),), all different."""
        if self._position + self._batch_size > self._size:
            self.epoch += 1
            self._begin_epoch()
        batch = self._order[self._position : self._position + self._batch_size]
        self._position += self._batch_size
        return batch

    def state_dict(self) -> dict[str, Tensor | int]:
        """The state for :meth:`load_state_dict`; small, since it has the generator's state, not the permutation."""
        return {
            "generator": self._generator_state.clone(),
            "epoch": self.epoch,
            "position": self._position,
            "size": self._size,
        }

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Continue from the position of the sampler that ``state`` is from; this sampler's own seed no longer matters.

        Raises:
            CheckpointError: the state is damaged or from a sampler for another number of images. This sampler
                is unchanged.
        """
        remedy = "resume with the data that the run began with"
        if state.get("size") != self._size:
            raise CheckpointError(
                f"the checkpoint's batches are of {state.get('size')} images, not of {self._size}; {remedy}"
            )
        try:
            epoch, position = int(state["epoch"]), int(state["position"])
            generator = torch.Generator()
            generator.set_state(torch.as_tensor(state["generator"]).cpu())
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError("the checkpoint's state of the batches is damaged; use another") from error
        if not 0 <= position <= self._size:
            raise CheckpointError(f"the checkpoint's position {position} is not in its {self._size} images")
        self.epoch = epoch
        self._generator = generator
        self._begin_epoch()
        self._position = position

    def _begin_epoch(self) -> None:
        self._generator_state = self._generator.get_state()
        self._order = torch.randperm(self._size, generator=self._generator)
        self._position = 0
