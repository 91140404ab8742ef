"""The arrays of a case on the GPU, and the truth about one of its heads in float64, by which every library is judged before it is timed."""

from __future__ import annotations

import functools
from typing import Any

import numpy

import cuflash
from bench.cases import Case
from bench.machine import Machine, the_torch
from bench.truth import Head
from cuflash import reference
from cuflash.problem.features import NO_FEATURES

ALLOWED_ERROR = {"float16": 3e-3, "bfloat16": 2e-2, "float32": 2e-5}
"""Relative to the norm of the result. What another library exceeds up to a hundredfold in float32 is TF32, and said so."""

LONGEST_IN_NUMPY = 2048
"""Without torch, longer sequences are not checked."""


class Operands:
    """Arrays of a case: torch tensors where there is torch, else CuPy or NumPy arrays.

    Attributes:
        case, torch: the case, and the module or None.
        arrays: query, key, value and grad_out, (batch, seqlen, heads, head_dim) or (tokens, heads, head_dim).
        arguments: the keyword arguments of cuflash's two calls, `Sample.arguments` on the same device.
        truth: out, query, key, value (gradients) of the last query head or its key head in one sequence, attn_mask (gradient) of the last head; None if not known.
    """

    def __init__(self, case: Case, machine: Machine) -> None:
        self.case, self.torch, self._machine = case, the_torch(), machine
        sample = case.sample
        if self.torch is not None:
            generator = self.torch.Generator(self._where).manual_seed(1)
            dtype = getattr(self.torch, sample.dtype)
            self.arrays = {
                name: self.torch.randn(shape, generator=generator, device=self._where).to(dtype) for name, shape in sample.shapes().items()
            }
        else:
            self.arrays = {name: self.placed(values, sample.dtype) for name, values in sample.operands(1).items()}
        self.arguments = {
            name: self.placed(x, str(sample.features.attn_mask) if name == "attn_mask" else str(x.dtype))
            if isinstance(x, numpy.ndarray)
            else x
            for name, x in case.arguments.items()
        }
        known = self.torch is not None or case.seqlen <= LONGEST_IN_NUMPY
        self.truth = self._truth() if known else None

    @property
    def _where(self) -> str:
        return "cpu" if self._machine.dry else "cuda"

    @functools.cached_property
    def visible(self) -> Any:
        """Which keys each query sees: boolean (batch or 1, 1, seqlen_q, seqlen_kv), on the GPU."""
        sample = self.case.sample
        same_for_all = sample.lengths_kv is None and sample.features.attn_mask is None
        rows = [rules.visible(b, 0) for rules, b in map(self.case.rules, range(1 if same_for_all else sample.batch))]
        return self.placed(numpy.stack(rows)[:, None], "bool")

    @property
    def judged_sequence(self) -> int:
        """The last row of a batch; the second longest of packed sequences."""
        return min(1, self.case.num_sequences - 1) if self.case.sample.is_packed else self.case.sample.batch - 1

    def placed(self, values: Any, dtype: str) -> Any:
        """A NumPy array on the GPU, float32 values as `dtype`."""
        if self.torch is not None:
            return self.torch.as_tensor(values).to(self._where).to(getattr(self.torch, dtype))
        return placed_without_torch(values, dtype, self._machine)

    def errors(self, results: dict[str, Any]) -> list[float]:
        """Relative errors of out, or of the gradients of query, key, value and attn_mask, as far as they are known."""
        found = []
        for name, want in (self.truth or {}).items():
            if name in results:
                got = self._double(results[name], self._index(name, self.judged_sequence, -1))
                found.append(float(_norm(got - want)) / max(float(_norm(want)), 1e-300))
        return found

    def _double(self, x: Any, index: Any) -> Any:
        return x[index].double() if self.torch is not None else reference.to_float64(x)[index]

    def _index(self, name: str, sequence: int, head: int) -> Any:
        """Where the rows of one head of one sequence are in query, key, value or what has their shape; of a mask's gradient, where the head is."""
        sample = self.case.sample
        if name == "attn_mask":
            return (0, head)
        if not sample.is_packed:
            return (sequence, slice(None), head)
        lengths = sample.packed_lengths[0 if name in ("query", "grad_out", "out") else 1]
        begin = sum(lengths[:sequence])
        return (slice(begin, begin + lengths[sequence]), head)

    def _truth(self) -> dict[str, Any]:
        sample, sequence, last = self.case.sample, self.judged_sequence, self.case.sample.num_heads_q - 1
        of_mask = sample.features.need_attn_mask_grad
        found = self._head(sequence, last).out_and_gradients(of_mask=of_mask)
        for head in range(last + 1 - sample.num_heads_q // sample.num_heads_kv, last):  # the others that share the key head
            other = self._head(sequence, head).out_and_gradients()
            found["key"] += other["key"]
            found["value"] += other["value"]
        if of_mask:
            assert sample.features.mask_axes == "hqk", "gradients are judged for one mask of each head"
            for other_sequence in range(sequence):
                found["attn_mask"] += self._head(other_sequence, last).out_and_gradients(of_mask=True)["attn_mask"]
        return found

    def _head(self, sequence: int, head: int) -> Head:
        sample, problem, (rules, batch) = self.case.sample, self.case.problem, self.case.rules(sequence)
        key_head = head * sample.num_heads_kv // sample.num_heads_q
        query, key, value, grad_out = (
            self._double(self.arrays[name], self._index(name, sequence, key_head if name in ("key", "value") else head))
            for name in ("query", "key", "value", "grad_out")
        )
        plain = problem.features.kinds == NO_FEATURES and not problem.seqlens_kv
        return Head(self.torch or numpy, query, key, value, grad_out, problem.scale, rules, batch, head, plain)


def placed_without_torch(values: Any, dtype: str, machine: Machine) -> Any:
    """A NumPy array, float32 values as `dtype`, as a CuPy array, or as a NumPy array that the simulator takes."""
    elements = reference.to_bfloat16_bits(values) if dtype == "bfloat16" else values.astype(dtype)
    elements = elements if machine.dry else machine.cupy.asarray(elements)
    return cuflash.bfloat16(elements) if dtype == "bfloat16" else elements


def _norm(x: Any) -> Any:
    return (x * x).sum() ** 0.5
