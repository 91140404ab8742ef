"""Workspace that outlives a call, so that a step of generation allocates nothing but its result.

What a thread launches into a stream runs in order, so its calls there can have the same bytes one after the other. Each thread has a piece of memory for each
stream and kind of array, as large as the largest call has asked for. With too many streams, that of the one used longest ago goes back to its library, which
keeps it for later work of that stream. Which streams of which library that is safe in `Framework.keeps_memory` says: NumPy's, CuPy's default streams. While a graph is captured nothing kept is given out: its replays write to what it had, whatever else runs then.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from cuflash.arrays.borrowing import Array
from cuflash.arrays.frameworks import Framework
from cuflash.arrays.signatures import pointer
from cuflash.planning.kernel_plan import Buffer

MAX_BYTES = 2**25
"""Of a piece: what needs more is allocated anew each time."""
_MAX_STREAMS = 8
"""With a piece for each, of a thread."""
_ALIGNMENT = 256
_LEGACY_STREAMS = (0, 1)  # of which there is no capture, and about which one must not ask while another stream is captured


Stream: TypeAlias = tuple[Framework, tuple[str, int], int]
"""What makes the memory, where it lies, and in which stream it is used."""


class Piece(NamedTuple):
    """Memory that is kept."""

    address: int
    nbytes: int
    owner: Any


class Places:
    """Where each buffer of a workspace lies in one piece of memory.

    Attributes:
        offsets: name and first byte.
        nbytes: of the piece. Between two buffers some bytes are free, so that the simulator sees a kernel that runs over an end.
    """

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.offsets: list[tuple[str, int]] = []
        self.nbytes = 0
        for buffer in buffers:
            self.offsets.append((buffer.name, self.nbytes))
            self.nbytes += (buffer.nbytes // _ALIGNMENT + 1) * _ALIGNMENT

    def write(self, addresses: dict[str, int], begin: int) -> None:
        """Add those of the buffers, of a piece that begins there."""
        for name, offset in self.offsets:
            addresses[name] = begin + offset

    @property
    def may_be_kept(self) -> bool:
        return 0 < self.nbytes <= MAX_BYTES


class _Pieces(dict[Stream, Piece]):
    """Of a thread; that of the stream used last is the last. Unlike other dicts it can be found without being kept alive."""


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.pieces = _Pieces()
        _of_all_threads[id(self.pieces)] = self.pieces


_of_all_threads: weakref.WeakValueDictionary[int, _Pieces] = weakref.WeakValueDictionary()
_kept = _OfThread()


def clear_workspace() -> int:
    """Give back the workspace that is kept for the next calls, of all threads: where generation has ended, and others want the memory.

    Calls that are running keep theirs, and the next call of a kind allocates it anew. The memory goes to the library that made it: with CuPy, to the pool of its
    device.

    Returns:
        How many bytes that were.
    """
    given_back = 0
    for pieces in list(_of_all_threads.values()):
        while pieces:
            try:
                _, piece = pieces.popitem()
            except KeyError:  # its thread has just taken the last one
                break
            given_back += piece.nbytes
    return given_back


def take(nbytes: int, like: Array, stream: int) -> tuple[Stream, Piece]:
    """A piece of at least so many bytes for a call on arrays like this one, to `give_back` behind its launches.

    What runs in between in this thread, such as a signal's handler, finds none there and has another one.
    """
    of = like.framework, like.device, stream
    found = _kept.pieces.pop(of, None)
    if found is None or found.nbytes < nbytes:
        owner = like.framework.empty((nbytes // 4,), "float32", like)
        found = Piece(pointer(owner), nbytes, owner)
    return of, found


def give_back(of: Stream, piece: Piece) -> None:
    """Keep a piece for the next call."""
    pieces = _kept.pieces
    pieces[of] = piece
    if len(pieces) > _MAX_STREAMS:
        del pieces[next(iter(pieces))]


def is_captured(device_kind: str, stream: int) -> bool:
    """Whether a graph is being made of what is launched into a stream."""
    if device_kind == "simulator" or stream in _LEGACY_STREAMS:
        return False
    from cupy.cuda import runtime

    return bool(runtime.streamIsCapturing(stream))
