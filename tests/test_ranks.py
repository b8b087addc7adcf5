"""What processes are told of one another; what they do together is in `test_together`."""

import threading
from types import SimpleNamespace

import pytest
import torch

from trl_cdr import ConfigError, ModelError
from trl_cdr.scoring import ranks
from trl_cdr.scoring.ranks import Ranks, Weights, check_equal, find_nodes


def weights(checksum, files="sha256 1"):
    return Weights("a/model", files, checksum)


def pairs(*checksums, **kwargs):
    return {rank: {"strong": weights(0), "weak": weights(each, **kwargs)} for rank, each in enumerate(checksums)}


def test_equal_weights():
    check_equal({})
    check_equal(pairs(5))
    check_equal(pairs(5, 5, 5))


@pytest.mark.parametrize(
    ("checksums", "said"),
    [
        ((5, 6), "on rank 1 than on rank 0,"),
        ((6, 5, 5), "on rank 0 than on ranks 1, 2,"),
        ((5, 6, 5, 6), "on ranks 1, 3 than on ranks 0, 2,"),
        ((5, 6, 7, 5), "on ranks 1, 2 than on ranks 0, 3,"),
    ],
)
def test_unlike_weights_name_the_ranks(checksums, said):
    with pytest.raises(ModelError, match=rf"^weak \(a/model\) has other weights {said}.*Its files are the same"):
        check_equal(pairs(*checksums))


def test_unlike_weights_say_where_they_came_from():
    with pytest.raises(ModelError, match="weak .* passed as an object: load it from the same checkpoint, and whole"):
        check_equal(pairs(5, 6, files=None))
    found = pairs(5, 6)
    found[1]["weak"] = weights(6, "sha256 2")
    with pytest.raises(ModelError, match="weak .* Its files differ: have the same checkpoint"):
        check_equal(found)
    found[1]["strong"] = weights(1)
    with pytest.raises(ModelError, match="^strong "):
        check_equal(found)


def test_ranks_that_hold_no_pair_are_not_compared():
    check_equal({rank: pair for rank, pair in pairs(5, 6, 5, 6).items() if rank % 2 == 0})


@pytest.mark.parametrize(
    ("places", "nodes"),
    [
        ([(0, 1)], [range(1)]),
        ([(0, 2), (1, 2)], [range(2)]),
        ([(0, 2), (1, 2), (0, 2), (1, 2)], [range(2), range(2, 4)]),
        ([(0, 1), (0, 3), (1, 3), (2, 3)], [range(1), range(1, 4)]),
    ],
)
def test_nodes(places, nodes):
    assert find_nodes(places) == nodes


@pytest.mark.parametrize(
    "places",
    [
        [(0, 2), (0, 2)],
        [(0, 4), (1, 4)],
        [(0, 2), (1, 3), (2, 3)],
        [(1, 2), (0, 2)],
        [(0, 1), (1, 1)],
        [(0, 0)],
        [(0, 2), (1, 2), (1, 2), (0, 2)],
    ],
)
def test_places_that_contradict_one_another(places):
    with pytest.raises(ConfigError, match="LOCAL_RANK and LOCAL_WORLD_SIZE of rank .* do not fit"):
        find_nodes(places)


@pytest.mark.parametrize("replicas", ["rank", "node"])
def test_one_process(replicas):
    """Which no launcher has started."""
    ranks = Ranks(replicas)
    assert ranks.have_met
    assert ranks.holds_pair
    ranks.check_holds()


def test_what_is_told_travels_by_the_process_s_own_device_in_every_thread(monkeypatch):
    """TRL awaits rewards in a thread of its own, and a thread begins on the first device."""
    done = []
    monkeypatch.setattr(ranks, "PartialState", lambda: SimpleNamespace(device=torch.device("cuda", 3)))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append((threading.get_ident(), device.index)))
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(ranks.dist, "all_gather_object", lambda found, mine: done.append("gathered"))
    thread = threading.Thread(target=ranks._gather, args=("mine",))
    thread.start()
    thread.join()
    assert done == [(thread.ident, 3), "gathered"]
