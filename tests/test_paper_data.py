"""Parts of the data have nothing to do with each other."""

import sys

import pytest
import torch

from bench.paper import data

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="the package that holds the spoken digits has no release for Python 3.10"
)


def told(text: data.Text, part: torch.Tensor) -> str:
    """A part's characters, every space the same."""
    return " ".join("".join(text.characters[k] for k in part.tolist()).split())


def test_text_is_not_learnt_by_heart():
    """Of held-out stretches of 50 characters few stand in the training part: common phrases, no paragraphs."""
    text = data.load_text()
    seen = told(text, text.train)
    known = {seen[k : k + 50] for k in range(len(seen) - 50)}
    for part in (text.validation, text.test):
        of_part = told(text, part)
        stretches = [of_part[k : k + 50] for k in range(0, len(of_part) - 50, 50)]
        assert len(stretches) > 100
        assert sum(stretch in known for stretch in stretches) / len(stretches) < 0.05
    assert text.train.max() < len(text.characters)


def test_sentences_are_in_one_part_alone():
    found = data.load_sentences()

    def coded(k: int) -> tuple[int, ...]:
        n = int(found.lengths[k])
        return (*found.x[k, :n].tolist(), int(found.y[k, n - 1]))

    train, validation, test = ({coded(k) for k in part.tolist()} for part in found[3:6])
    # sentences that differ in rare characters alone, which are one, look the same: next to none
    assert len(train & test) <= 0.005 * len(test)
    assert len(train & validation) <= 0.01 * len(validation)
    # y is x one character later
    assert torch.equal(found.y[0, : found.lengths[0] - 1], found.x[0, 1 : found.lengths[0]])


@pytest.mark.parametrize(
    "load", [data.load_digits, data.load_spoken, data.load_vowels, lambda: data.load_mnist(7, True)]
)
def test_every_example_is_in_one_part(load):
    found = load()
    together = torch.cat([found.train, found.validation, found.test])
    assert together.sort().values.tolist() == list(range(len(found.y)))
    for part in (found.train, found.test):
        assert len(found.y[part].unique()) == found.classes


def test_permuted_pixels_are_all_there():
    """A true permutation, the same for all images."""
    plain, permuted = data.load_mnist(14, False), data.load_mnist(14, True)
    assert torch.equal(plain.x.sort(1).values, permuted.x.sort(1).values)
    assert not torch.equal(plain.x, permuted.x)
    columns = {tuple(column) for column in plain.x.t().tolist()}
    assert columns == {tuple(column) for column in permuted.x.t().tolist()}
    with pytest.raises(ValueError, match="side must divide 28"):
        data.load_mnist(5, False)
