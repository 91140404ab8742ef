"""The tensor unit of a sub-partition, which computes wgmma by itself: products wait in it and are served one after the other, while warps go on.

It holds so many products, those that wait and the one that it computes. A warp that wants to issue one more waits, and entries that become free go to waiting warps in
turn. Products are served in the order in which they were issued, as was measured (docs/h100.md), or else warps in turn. Operands in shared memory are read through the SM's
memory pipe while a product runs, which therefore lasts longer where the pipe is busy.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from cuflash.timing.machine import WarpgroupUnits

NEVER = float("inf")


@dataclass
class Group:
    """Products of one warp that are waited for together.

    Attributes:
        left: products that have been issued and not begun.
        closed: whether its last product has been issued.
        done: when its results are there, as far as its products have begun.
    """

    left: int = 0
    closed: bool = False
    done: float = 0.0

    @property
    def known_end(self) -> float:
        """When its results are there; NEVER while that is not known."""
        return self.done if self.closed and not self.left else NEVER


@dataclass(frozen=True)
class _Product:
    warp: int
    ready: float
    clocks: float
    wavefronts: float
    group: Group


class TensorUnit:
    """One of four."""

    def __init__(self, units: WarpgroupUnits, read: Callable[[float, float], float], *, in_turn: bool) -> None:
        """`read(time, wavefronts)` takes the memory pipe and returns when it is done; `in_turn`: warps are served in turn, not products in the order of their issue."""
        self.units, self.read, self.in_turn = units, read, in_turn
        self.waiting: deque[_Product] = deque()
        self.free = 0.0
        self.line: deque[int] = deque()  # warps that wait to issue, the first one next
        self.services: defaultdict[int, deque[tuple[float, float]]] | None = (
            None  # of each warp's products, begin and end; where they are recorded
        )
        self._served = -1

    def is_full(self, time: float) -> bool:
        """Whether no further product can be issued now."""
        return len(self.waiting) + (self.free > time) >= self.units.queue

    def admits(self, warp: int, time: float) -> bool:
        """Whether this warp may issue a product now. If not it waits in line."""
        if not self.is_full(time) and (not self.line or self.line[0] == warp):
            return True
        if warp not in self.line:
            self.line.append(warp)
        return False

    def issue(self, warp: int, clocks: float, wavefronts: float, group: Group, time: float) -> None:
        """A product of a warp."""
        if self.line and self.line[0] == warp:
            self.line.popleft()
        group.left += 1
        self.waiting.append(_Product(warp, time + self.units.product_start, clocks, wavefronts, group))

    def next_begin(self) -> float:
        """When the next product begins; NEVER without one."""
        return max(self.free, min(product.ready for product in self.waiting)) if self.waiting else NEVER

    def advance(self, time: float) -> bool:
        """Begin what begins until now; whether the end of a group has become known by that."""
        any_known = False
        while (begin := self.next_begin()) <= time:
            product = self._next(begin)
            self.waiting.remove(product)
            self.free = max(begin + product.clocks, self.read(begin, product.wavefronts))
            self._served = product.warp
            if self.services is not None:
                self.services[product.warp].append((begin, self.free))
            group = product.group
            group.left -= 1
            group.done = max(group.done, self.free + self.units.product_end)
            any_known |= group.known_end != NEVER
        return any_known

    def _next(self, begin: float) -> _Product:
        able = [product for product in self.waiting if product.ready <= begin]
        if not self.in_turn:
            return able[0]
        after = [product for product in able if product.warp > self._served]
        return min(after or able, key=lambda product: product.warp)
