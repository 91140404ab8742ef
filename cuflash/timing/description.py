"""What a prediction has to know of a kernel besides its machine code, and how both are kept in files.

A kernel is kept as `NAME.cubin` and `NAME.json`: `save` writes both, `load` reads them, and anybody else can. The JSON object has the fields of `Description`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuflash.arrays.descriptions import describe
from cuflash.errors import OptionError
from cuflash.hardware.device import ARCHITECTURES
from cuflash.planning.kernel_specs import KERNELS
from cuflash.problem.problem import DTYPES
from cuflash.problem.tile import Tile


@dataclass(frozen=True)
class Description:
    """One compiled kernel.

    Attributes:
        kernel: "forward", "backward_dkdv", …
        arch: "sm_80", …
        dtype: of the operands.
        head_dim, head_dim_v: of query and key, and of value.
        causal: whether it masks keys behind the query.
        tile: its tile.
        registers: per thread.
        spill_bytes: stored to local memory.
        shared_bytes: of a block, static and dynamic.
        barriers: named barriers of a block.
    """

    kernel: str
    arch: str
    dtype: str
    head_dim: int
    head_dim_v: int
    causal: bool
    tile: Tile
    registers: int
    spill_bytes: int
    shared_bytes: int
    barriers: int = 1

    @property
    def name(self) -> str:
        """A name for files that no other kernel of the kind has."""
        tile, mask = self.tile, "causal" if self.causal else "full"
        dim = f"d{self.head_dim}" if self.head_dim == self.head_dim_v else f"d{self.head_dim}_{self.head_dim_v}"
        shape = f"{tile.tile_q}x{tile.tile_kv}_w{tile.num_warps}_s{tile.num_stages}"
        return f"{self.kernel}_{self.arch}_{self.dtype}_{dim}_{mask}_{shape}"

    def to_json(self) -> dict[str, Any]:
        """The object that `save` writes."""
        return dataclasses.asdict(self)


def save(folder: Path, description: Description, cubin: bytes, name: str | None = None) -> Path:
    """Write both files; returns the path of the cubin."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name or description.name}.cubin"
    path.write_bytes(cubin)
    path.with_suffix(".json").write_text(json.dumps(description.to_json(), indent=1) + "\n", encoding="utf-8")
    return path


def load(path: Path) -> tuple[Description, bytes]:
    """Read what `save` wrote.

    Args:
        path: of the cubin; its JSON file lies beside it.

    Raises:
        OptionError: a file is missing or does not hold what it should.
    """
    hint = "Name a file that `python -m cuflash inspect --save DIR` wrote."
    record = path.with_suffix(".json")
    try:
        cubin, fields = path.read_bytes(), json.loads(record.read_text(encoding="utf-8"))
        return _checked(fields), cubin
    except OSError as error:
        raise OptionError("cubin", f"{str(error.filename)!r}: {error.strerror}", "NAME.cubin with NAME.json beside it", hint) from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise OptionError("cubin", f"{str(record)!r}: {error}", "a JSON object that describes a kernel", hint) from error


_NAMES = {"kernel": {kernel.name for kernel in KERNELS}, "arch": {*ARCHITECTURES}, "dtype": {*DTYPES}}
_LARGEST = 2**20
"""Of any number here, shared memory in bytes among them."""


def _checked(fields: dict[str, Any]) -> Description:
    """The description that a JSON object holds.

    Raises:
        TypeError, ValueError, KeyError: it holds something else.
    """
    tile = fields["tile"] if isinstance(fields["tile"], dict) else {}
    for name, value in (fields | {f"tile: {name}": size for name, size in tile.items()}).items():
        if name in _NAMES:
            valid = isinstance(value, str) and value in _NAMES[name]
        elif name == "causal":
            valid = isinstance(value, bool)
        elif name == "tile":
            valid = isinstance(value, dict)
        else:
            least = 1 if name.startswith(("head_dim", "tile")) else 0
            valid = isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST
        if not valid:
            raise ValueError(f"{name} is {describe(value)}")
    return Description(**(fields | {"tile": Tile(**fields["tile"])}))
