"""When an entry was measured, and which of two counts, whatever the clocks of their hosts say."""

from __future__ import annotations

import time

import pytest

from tests.support.tuning import H100, WORK, changed, entry
from triton_bnlstm.tuning.device import Identity
from triton_bnlstm.tuning.entry import merged
from triton_bnlstm.tuning.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(Identity.of(H100), tmp_path)


def anew(store):
    """As another process finds it."""
    return Store(store.identity, store.root)


def test_an_entry_from_a_clock_that_was_wrong_is_replaced(store):
    """What says that it is of the year 2286 must not stand for ever, as no entry would be later."""
    store.put(entry(at=1e10, faster=1.1))
    store.put(entry(at=1e9, faster=1.25))
    assert anew(store).get(WORK.key) == entry(at=1e9, faster=1.25)
    store.change("forward", lambda entries: {str(WORK.key): changed(at=10**400)})
    store.put(entry())
    assert anew(store).get(WORK.key) == entry()
    assert merged(changed(at=1e10), changed(at=2e10))["at"] == 2e10  # of two such the new one


def test_clocks_that_differ_a_little(store):
    """An older entry, brought from elsewhere, does not take the place of one from a host that is some seconds ahead."""
    ahead = time.time() + 5
    store.put(entry(at=ahead, faster=1.5))
    store.put(entry(at=1e9, faster=1.25))
    assert anew(store).get(WORK.key).gain == pytest.approx(1.5, rel=1e-4)


def test_who_knew_of_an_entry_is_later_than_it():
    known = entry(at=time.time() + 3600)
    new = entry(at=time.time(), faster=1.5).later_than(known)
    assert merged(known.as_json(), new.as_json())["candidates"] == new.as_json()["candidates"]
    assert merged(new.as_json(), known.as_json())["candidates"] == new.as_json()["candidates"]
    early, wrong = entry(at=1.0), entry(at=1e10)
    assert new.later_than(early) == new  # nothing to do
    assert early.later_than(wrong) == early  # whose date nobody believes


def test_a_date_in_a_file_is_never_later_than_it_was(store):
    """Else what is put at once has not happened yet."""
    for at in (1763980000.1239, 1763980000.9999, 12.0006):
        told = entry(at=at).as_json()["at"]
        assert at - 0.0011 < told <= at
