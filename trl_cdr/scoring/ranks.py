"""The processes of one run: whether all have the same weights, and which hold the pair and score for their neighbours.

Loads and scores nothing; `together` says what. `Ranks.meet` and `Node.exchange` wait for other processes, so that all
of them have to call, in the same order; what fails on one process fails on all that wait for it.
"""

import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from ..errors import CDRError, ConfigError, ModelError

_PLACE = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Weights:
    """
    Which weights a process has loaded of one model.

    Attributes:
        name (`str`): The model's.
        files (`str` or `None`): The checkpoint that they come from, as `identify_weights` has it; `None` for a model
            that was passed as an object.
        checksum (`int`): Of the weights themselves, as `fingerprint` has it.
    """

    name: str
    files: str | None
    checksum: int


@dataclass(frozen=True)
class Failure:
    """What went wrong on one process, as others are told of it: not every exception survives a pickle."""

    rank: int
    kind: type[Exception]
    message: str

    def raised(self) -> Exception:
        """An error for another process."""
        return self.kind(f"rank {self.rank}: {self.message}")


class Ranks:
    """
    The processes of one run, and where its pairs are.

    Args:
        replicas (`str`): `cdr_replicas`.

    Attributes:
        node (`Node` or `None`): The processes that score together, once they have met; `None` where each holds a pair.
    """

    def __init__(self, replicas: str) -> None:
        self._replicas = replicas
        self._is_done = False
        self.node: Node | None = None

    @property
    def have_met(self) -> bool:
        """Whether there is nobody to wait for, or no more."""
        return self._is_done or not _are_several()

    @property
    def holds_pair(self) -> bool:
        """
        Whether this process is to load the pair.

        Raises:
            ConfigError: it can't be told: the launcher does not say which process of its machine this is.
        """
        return self._replicas == "rank" or not _are_several() or _place()[0] == 0

    def check_holds(self) -> None:
        """
        Raises:
            ConfigError: this process is to hold no pair; see also `holds_pair`.
        """
        if not self.holds_pair:
            raise ConfigError(
                f"cdr_replicas is 'node', and this process (rank {dist.get_rank()}) holds no pair: rows are brought to "
                "the one of its machine that does in the calls that a trainer makes, on all processes at once, and in "
                "no others. Score where LOCAL_RANK is 0, or pass cdr_replicas='rank'."
            )

    def meet(self, load: Callable[[], Mapping[str, Weights]]) -> None:
        """
        Load the pair wherever it is to be, and see that it is the same one.

        Args:
            load (`Callable`): Loads the pair, and says which weights strong and weak have. Called where the pair is
                held.

        Raises:
            ModelError: weights differ between processes.
            ConfigError: which processes are of one machine can't be told.
            Exception: what `load` raised, here or on another process.
        """

        def report() -> tuple[Any, Any]:
            return _place() if self._replicas == "node" else None, load() if self.holds_pair else None

        told, error = _attempt(report)
        reports = _gather(told if error is None else _tell(error))
        _raise_first(reports, error)
        check_equal({rank: weights for rank, (_, weights) in enumerate(reports) if weights is not None})
        if self._replicas == "node":
            nodes = find_nodes([place for place, _ in reports])
            groups = [dist.new_group(list(node), backend="gloo") for node in nodes]  # every process makes all of them
            mine = next(index for index, node in enumerate(nodes) if dist.get_rank() in node)
            self.node = Node(nodes[mine], groups[mine])
        self._is_done = True

    def lowest(self, values: Mapping[Hashable, float]) -> dict[Hashable, float]:
        """Return the lowest of each value over all processes, which may have different ones. Waits for all of them."""
        found: dict[Hashable, float] = {}
        for part in _gather(dict(values)) if _are_several() else [values]:
            for name, value in part.items():
                found[name] = min(value, found.get(name, value))
        return found


class Node:
    """
    The processes of one machine, of which the first works for all.

    Args:
        ranks (`Sequence[int]`): Theirs in the run, in order.
        group (`ProcessGroup`): Theirs.
    """

    def __init__(self, ranks: Sequence[int], group: Any) -> None:
        self._ranks = ranks
        self._group = group

    def exchange(self, read: Callable[[], Any], work: Callable[[list[Any]], Sequence[Any]]) -> Any:
        """
        Bring together what each process has, and hand each its part of what comes out.

        Args:
            read (`Callable`): What this process brings.
            work (`Callable`): Called on the first process, with what was brought, in the order of ranks; returns as
                many parts.

        Raises:
            Exception: what `read` or `work` raised, here or on another process.
        """
        first, is_first = self._ranks[0], dist.get_rank() == self._ranks[0]
        mine, error = _attempt(lambda: pickle.dumps(read()))
        brought: list[Any] | None = [None] * len(self._ranks) if is_first else None
        dist.gather_object(mine if error is None else _tell(error), brought, dst=first, group=self._group)
        parts: list[Any] | None = None
        if brought is not None:
            failed = next((told for told in brought if isinstance(told, Failure)), None)
            if failed is None:
                parts, error = _attempt(lambda: [pickle.dumps(part) for part in work([*map(pickle.loads, brought)])])
                failed = None if error is None else _tell(error)
            parts = parts if failed is None else [failed] * len(self._ranks)
        got: list[Any] = [None]
        dist.scatter_object_list(got, parts, src=first, group=self._group)
        _raise_first(got, error)
        return pickle.loads(got[0])


def check_equal(found: Mapping[int, Mapping[str, Weights]]) -> None:
    """
    Whether processes have loaded the same weights.

    Args:
        found (`Mapping[int, Mapping[str, Weights]]`): Of each rank that holds a pair, strong and weak.

    Raises:
        ModelError: they have not; the message names the ranks that differ from most.
    """
    for role in ("strong", "weak"):
        by_checksum: dict[int, list[int]] = defaultdict(list)
        for rank, weights in sorted(found.items()):
            by_checksum[weights[role].checksum].append(rank)
        if len(by_checksum) < 2:
            continue
        most = max(by_checksum.values(), key=len)  # of as many on both sides the lower ranks
        others = sorted(rank for ranks in by_checksum.values() if ranks is not most for rank in ranks)
        one, other = found[most[0]][role], found[others[0]][role]
        if other.files != one.files:
            reason = "Its files differ: have the same checkpoint, or the same revision, on every machine."
        elif one.files is None:
            reason = "It was passed as an object: load it from the same checkpoint, and whole, in every process."
        else:
            reason = "Its files are the same: were they written while they were read? Start again."
        raise ModelError(
            f"{role} ({other.name}) has other weights on {_show(others)} than on {_show(most)}, and rewards would "
            f"depend on who gives them. {reason}"
        )


def find_nodes(places: Sequence[tuple[int, int]]) -> list[range]:
    """
    Which processes are of one machine.

    Args:
        places (`Sequence[tuple[int, int]]`): Of each rank, its number on its machine and how many there are.

    Returns:
        `list[range]`: the ranks of each machine, in order.

    Raises:
        ConfigError: the numbers contradict one another.
    """
    nodes = [range(rank - local, rank - local + size) for rank, (local, size) in enumerate(places)]
    for rank, node in enumerate(nodes):
        is_known = node.start >= 0 and node.stop <= len(places) and rank in node
        if not is_known or any(nodes[other] != node for other in node):
            raise ConfigError(
                f"cdr_replicas is 'node', and LOCAL_RANK and LOCAL_WORLD_SIZE of rank {rank}, {places[rank]}, do not "
                f"fit those of the other ranks ({list(places)}): the ranks of a machine follow one another. Launch "
                "with accelerate launch or torchrun, or pass cdr_replicas='rank'."
            )
    return list(dict.fromkeys(nodes))


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _place() -> tuple[int, int]:
    """This process's number on its machine, and how many there are."""
    try:
        local, size = (int(os.environ[name]) for name in _PLACE)
    except (KeyError, ValueError):
        raise ConfigError(
            "cdr_replicas is 'node', and LOCAL_RANK and LOCAL_WORLD_SIZE do not say which process of its machine this "
            "is. Launch with accelerate launch or torchrun, or pass cdr_replicas='rank'."
        ) from None
    return local, size


def _gather(mine: Any) -> list[Any]:
    """What every process of the run has, by rank."""
    device = PartialState().device
    if device.index is not None:  # objects travel by the thread's device, which begins as the first in every new thread
        getattr(torch, device.type).set_device(device)
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _attempt(action: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return action(), None
    except Exception as error:  # whatever it is, others wait for this process
        return None, error


def _tell(error: Exception) -> Failure:
    """Ours keep their class; of a library's, others are told what it said."""
    if isinstance(error, CDRError):
        return Failure(dist.get_rank(), type(error), str(error))
    return Failure(dist.get_rank(), RuntimeError, f"{type(error).__name__}: {error}")


def _raise_first(told: Sequence[Any], own: Exception | None) -> None:
    """Raise this process's own error, or what another one has told."""
    if own is not None:
        raise own
    for each in told:
        if isinstance(each, Failure):
            raise each.raised()


def _show(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
