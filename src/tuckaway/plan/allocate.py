"""Fill devices in order with the blocks of a model, in the model's order: :func:`allocate`.

Tied tensors stay together: placing a block takes along every pending one that shares a tensor with it. A block that
does not fit is split into the tensors it holds itself (buffers too, which accelerate drops) and its children, unless
it may not be; then the next device is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from tuckaway.plan.memory import Device
from tuckaway.plan.ties import named_tensors

__all__ = ["Allocation", "Tree", "allocate", "is_block"]

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def is_block(model: nn.Module, path: str, whole: Collection[str]) -> bool:
    """Tell whether a module is paged as one: never split between devices unless nothing else is possible.

    It is a module whose class is in ``whole``, a leaf, an element of a list of modules, or a module that runs and
    has no such list below it. A root is none: all of it would have to fit at once. What paging makes a page of is a
    block here, so a list in a list is one where it is small: ``Sequential(convolution, norm, activation)``.
    """
    module = model.get_submodule(path)
    if type(module).__name__ in whole or not any(True for _ in module.children()):
        return True
    if type(module).forward is nn.Module.forward or not path:
        return False
    if isinstance(model.get_submodule(path.rpartition(".")[0]), _LISTS):
        return not isinstance(module, _LISTS) or not any(
            True for c in module.children() for _ in c.children()
        )
    if isinstance(module, _LISTS):
        return False
    return not any(isinstance(below, _LISTS) for below in module.modules())


@dataclass(frozen=True)
class Node:
    """A module or a tensor that can be placed.

    Args:
        name: dotted name.
        tensors: the identities of the tensors at or below it.
        module: None for a tensor.
    """

    name: str
    tensors: frozenset[int]
    module: nn.Module | None


class Tree:
    """The modules and tensors of a model, with exact bytes.

    Args:
        model: its tensors may be on the meta device.
        sizes: bytes of every tensor under each of its names.
    """

    def __init__(self, model: nn.Module, sizes: Mapping[str, int]) -> None:
        self.model = model
        self.sizes: dict[int, int] = {}
        self._below: dict[str, set[int]] = {}
        self.tied: set[int] = set()
        for name, tensor in named_tensors(model):
            if id(tensor) in self.sizes:
                self.tied.add(id(tensor))
            self.sizes[id(tensor)] = sizes[name]
            path = name
            while True:
                self._below.setdefault(path, set()).add(id(tensor))
                if not path:
                    break
                path = path.rpartition(".")[0]

    def bytes_of(self, tensors: Collection[int]) -> int:
        """Return the bytes of distinct tensors."""
        return sum(self.sizes[tensor] for tensor in tensors)

    def children(self, path: str) -> list[Node]:
        """Return the tensors that a module holds itself, then its children, in order."""
        module = self.model.get_submodule(path)
        prefix = f"{path}." if path else ""
        own = {**module._parameters, **module._buffers}
        nodes = [
            Node(prefix + name, self.below(prefix + name), None)
            for name, held in own.items()
            if held is not None
        ]
        for name, child in module._modules.items():
            if child is not None:
                nodes.append(Node(prefix + name, self.below(prefix + name), child))
        return nodes

    def leaves(self, path: str, keep: Callable[[str, nn.Module], bool]) -> Iterator[Node]:
        """Yield the nodes at and below ``path`` that are not split further."""
        for node in self.children(path):
            if node.module is None or keep(node.name, node.module):
                yield node
            else:
                yield from self.leaves(node.name, keep)

    def below(self, path: str) -> frozenset[int]:
        """Return the identities of the tensors at or below a name."""
        return frozenset(self._below.get(path, ()))


@dataclass
class Allocation:
    """What :func:`allocate` found.

    Args:
        device_map: name to device, in the order of placement.
        used: bytes of each device.
        left: names of what fits on no device.
        refused: for each device that took nothing, the bytes its first candidate needed.
    """

    device_map: dict[str, Device] = field(default_factory=dict)
    used: dict[Device, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    refused: dict[Device, int] = field(default_factory=dict)


def allocate(
    tree: Tree,
    devices: Sequence[Device],
    limits: Mapping[Device, int],
    may_split: Callable[[str, nn.Module], bool],
    *,
    fallback: bool = False,
    first: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
) -> Allocation:
    """Place everything, device by device.

    Args:
        tree: the model.
        devices: in the order they are filled.
        limits: bytes by device; a device without one takes everything.
        may_split: whether a module (by name) may be split between devices.
        fallback: a device that would stay empty takes the first later block that fits it.
        first: names of blocks that the first device takes before all others.
        say: told of every decision.
    """
    result = Allocation(used=dict.fromkeys(devices, 0))
    pending = tree.children("")
    for name in first:
        pending = _split_down_to(tree, pending, name)
        index = next((i for i, node in enumerate(pending) if node.name == name), None)
        if index is None:
            continue  # it went with one it is tied to
        group = _tied(tree, pending, index)
        if result.used[devices[0]] + tree.bytes_of(_tensors(group)) <= limits[devices[0]]:
            _place(result, tree, pending, group, devices[0], say)
    at = 0
    while pending:
        node = pending[0]
        if at == len(devices):
            result.left = [n.name for n in pending if n.tensors or not result.device_map]
            break
        device = devices[at]
        room = limits[device] - result.used[device] if device in limits else None
        group = _tied(tree, pending, 0)
        need = tree.bytes_of(_tensors(group))
        if room is None or need <= room or need == 0:
            _place(result, tree, pending, group, device, say)
            continue
        if say is not None:
            say(f"{node.name} needs {need} bytes, {device} has {room}")
        parts = next((n for n in group[1:] if _splits(n, may_split)), None)
        if tree.bytes_of(node.tensors) > room or parts is None:
            parts = node if _splits(node, may_split) else None
        if parts is not None:
            index = pending.index(parts)
            pending[index : index + 1] = tree.children(parts.name)
            continue
        if fallback and result.used[device] == 0:
            found = _first_that_fits(tree, pending, room, may_split)
            if found is not None:
                pending, index = found
                _place(result, tree, pending, _tied(tree, pending, index), device, say)
                continue
        if result.used[device] == 0:
            result.refused[device] = need
        at += 1
    return result


def _place(
    result: Allocation,
    tree: Tree,
    pending: list[Node],
    group: list[Node],
    device: Device,
    say: Callable[[str], None] | None,
) -> None:
    size = tree.bytes_of(_tensors(group))
    for node in group:
        result.device_map[node.name] = device
    result.used[device] += size
    names = {node.name for node in group}
    pending[:] = [node for node in pending if node.name not in names]
    if say is not None:
        say(f"{', '.join(n.name for n in group)} ({size} bytes) to {device}")


def _tied(tree: Tree, pending: list[Node], index: int) -> list[Node]:
    """The node at ``index``, and all pending ones it is tied to, directly or through others."""
    group, tensors = [pending[index]], set(pending[index].tensors)
    grew = not tree.tied.isdisjoint(tensors)
    while grew:
        grew = False
        for node in pending:
            if node not in group and not tensors.isdisjoint(node.tensors):
                group.append(node)
                tensors |= node.tensors
                grew = True
    return group


def _split_down_to(tree: Tree, pending: list[Node], name: str) -> list[Node]:
    """Return ``pending`` with the node of that name in it, in place of what it lies in."""
    nodes, index = list(pending), 0
    while index < len(nodes) and nodes[index].name != name:
        if name.startswith(f"{nodes[index].name}."):
            nodes[index : index + 1] = tree.children(nodes[index].name)
        else:
            index += 1
    return nodes


def _tensors(group: list[Node]) -> set[int]:
    return set().union(*(node.tensors for node in group))


def _splits(node: Node, may_split: Callable[[str, nn.Module], bool]) -> bool:
    return node.module is not None and may_split(node.name, node.module)


def _first_that_fits(
    tree: Tree, pending: list[Node], room: int, may_split: Callable[[str, nn.Module], bool]
) -> tuple[list[Node], int] | None:
    """The first later block of at least a byte that fits, with ``pending`` split as far as that takes."""
    nodes, index = list(pending), 0
    while index < len(nodes):
        node = nodes[index]
        if node.tensors and tree.bytes_of(_tensors(_tied(tree, nodes, index))) <= room:
            return nodes, index
        if _splits(node, may_split):
            nodes[index : index + 1] = tree.children(node.name)
        else:
            index += 1
    return None
