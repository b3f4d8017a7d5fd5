"""Autograd with sizes in place of numbers: blocks that are alive as long as they are held, operators, and the way back."""

from __future__ import annotations

import heapq
from collections.abc import Callable

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "buckets", "context", "holes")
"""buffers: what a matmul needs besides, dequantised and cast weights above all. The last three only the plan adds (memory.py); buckets are
what goes to other ranks or comes from them, holes what the allocator cannot use."""


class Heap:
    """Bytes alive by part, the parts when their sum was highest, and how many blocks of how many bytes and matmuls there were in all."""

    def __init__(self) -> None:
        self.live = dict.fromkeys(PARTS, 0.0)
        self.total = self.peak = self.written = self.random = self.unpacked = 0.0
        """random: numbers drawn for dropout; unpacked: of weights, from 4 bits."""
        self.blocks = self.products = 0
        self.functions = 0.0
        """functions: autograd functions that are written in Python, called or gone back through."""
        self.at_peak = dict(self.live)


class Block:
    """Memory that is alive as long as this object is."""

    __slots__ = ("heap", "part", "size")

    def __init__(self, heap: Heap, size: float, part: str) -> None:
        self.heap, self.size, self.part = heap, size, part
        heap.live[part] += size
        heap.total += size
        heap.written += size
        heap.blocks += 1
        if heap.total > heap.peak:
            heap.peak, heap.at_peak = heap.total, dict(heap.live)

    def __del__(self) -> None:
        self.heap.live[self.part] -= self.size
        self.heap.total -= self.size


Gradients = tuple["Block | None", ...]


class Node:
    """An operator in autograd's graph: `run` turns its output's gradient (in a list, which it may empty) into its inputs'."""

    __slots__ = ("gradient", "number", "parents", "run")

    def __init__(self, number: int, parents: tuple[Node | None, ...], run: Callable[[list[Block]], Gradients]) -> None:
        self.number, self.parents, self.run = number, parents, run
        self.gradient: Block | None = None


class Value:
    """A tensor [rows, width] of elements of some bytes; node None: wants no gradient; again: makes it once more, so none need keep it."""

    __slots__ = ("again", "block", "bytes", "node", "rows", "width")

    def __init__(self, block: Block, rows: float, width: float, bytes: int, node: Node | None) -> None:
        self.block, self.rows, self.width, self.bytes, self.node = block, rows, width, bytes, node
        self.again: Callable[[], Block] | None = None

    @property
    def size(self) -> float:
        return self.rows * self.width * self.bytes


class Tape:
    """What operators do in forward, and backward through them."""

    def __init__(self, heap: Heap) -> None:
        self.heap = heap
        self.recording = True
        """What operators keep for backward is kept."""
        self.stopped = False
        """What comes is not computed: a recomputed layer has been as far as its last saved tensor."""
        self.count = 0

    def function(self, times: float = 1.0) -> None:
        """An autograd function in Python is called, or gone back through; times: how much of ours it is."""
        self.heap.functions += 0.0 if self.stopped else times

    def block(self, size: float, part: str = "activations") -> Block:
        return Block(self.heap, 0.0 if self.stopped else size, part)

    def apply(
        self, inputs: tuple[Value, ...], rows: float, width: float, bytes: int, run: Callable[[list[Block]], Gradients],
        *, block: Block | None = None, trained: bool = False, part: str = "activations",
    ) -> Value:  # fmt: skip
        """The output of an operator, with a node where an input or a weight of its own wants a gradient."""
        node = None
        if trained or any(value.node for value in inputs):
            self.count += 1
            node = Node(self.count, tuple(value.node for value in inputs), run if self.recording else spent)
        return Value(block or self.block(rows * width * bytes, part), rows, width, bytes, node)

    def backward(self, root: Node | None, gradient: Block, leaf: Node | None = None) -> Block | None:
        """Run the graph above a node, newest operators first, as autograd does; the gradient of `leaf` where one is asked for."""
        assert root
        waiting: dict[Node, int] = {}
        pending, seen = [root], {root}
        while pending:
            for parent in pending.pop().parents:
                if parent:
                    waiting[parent] = waiting.get(parent, 0) + 1
                    if parent not in seen:
                        seen.add(parent)
                        pending.append(parent)
        seen.clear()
        root.gradient = gradient
        del gradient
        ready = [(-root.number, root)]
        while ready:
            _, node = heapq.heappop(ready)
            if node is leaf:
                break
            given = [node.gradient] if node.gradient else []
            node.gradient = None
            gradients = list(node.run(given))
            del given
            node.run = spent  # what was saved is released
            for parent in node.parents:
                grown = gradients.pop(0)
                if parent is None:
                    continue
                waiting[parent] -= 1
                if parent.gradient and grown:
                    grown = self.block(grown.size)  # added up out of place
                parent.gradient = grown or parent.gradient
                del grown
                if not waiting[parent]:
                    heapq.heappush(ready, (-parent.number, parent))
        return leaf.gradient if leaf else None


def spent(_: list[Block]) -> Gradients:
    raise RuntimeError("backward passes here a second time")
