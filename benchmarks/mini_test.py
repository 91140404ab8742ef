"""A published small test: multi-head attention trained for 100 steps, plain, with dropout and with a mask, in several ways.

    python benchmarks/mini_test.py                      # on a GPU: an input of (32, 128, 500), and read the other way, batch 32, sequence 500, model 128
    python benchmarks/mini_test.py --small              # a tiny one, on the simulator without a GPU: whether this program works; its times mean nothing

All ways start from the same parameters and see the same input and target; the loss is the mean squared error, the optimizer plain gradient descent. Without
dropout their losses are the same to rounding, and the program says how far they are apart; with it each way draws masks of its own. The loss is computed in
float32 and scaled for the backward pass, the learning rate is divided by the same power of two: gradients of a mean over millions of numbers are subnormal in float16.

    standard      scores, softmax and dropout written out
    torch         torch.nn.MultiheadAttention
    sdpa          torch's scaled_dot_product_attention, whichever kernel it takes
    flash-attn    where it is installed, in 16 bits; it knows no mask
    cuflash       cuflash.torch.MultiheadAttention
    arrays        cuflash on CuPy arrays, on NumPy's without a GPU: no torch, gradients written out

A way that cannot do a case, or fails in it, has its reason in the table. Times are microseconds of all steps, by events on a GPU. One step goes before.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # cuflash of this clone, whether it is installed or not

import numpy
import torch
from torch import nn
from torch.nn import functional as F

import cuflash
import cuflash.torch

WAYS = ("standard", "torch", "sdpa", "flash-attn", "cuflash", "arrays")
CASES = ("plain", "dropout", "mask")
DROPOUT, RATE, SEED = 0.1, 0.5, 7
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@dataclass(frozen=True)
class Shape:
    """Of the input, and how it is cut into heads."""

    batch: int
    seqlen: int
    width: int
    num_heads: int


FULL = (Shape(32, 128, 500, 10), Shape(32, 500, 128, 8))
SMALL = (Shape(2, 24, 32, 2),)


@dataclass(frozen=True)
class Result:
    """Of one way in one case; `note` says why there are no times."""

    way: str
    case: str
    shape: Shape
    microseconds: float | None = None
    losses: tuple[float, ...] = ()
    note: str = ""


class Problem:
    """Input, target, mask and the first parameters, the same for all ways."""

    def __init__(self, shape: Shape, case: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(SEED)
        extents = (shape.batch, shape.seqlen, shape.width)
        self.shape, self.case, self.dtype = shape, case, dtype
        self.x, self.target = (torch.randn(extents, generator=generator).to(DEVICE, dtype) for _ in range(2))
        bound = math.sqrt(3 / shape.width)
        self.weights = [((2 * torch.rand(shape.width, shape.width, generator=generator) - 1) * bound).to(DEVICE, dtype) for _ in range(4)]
        hidden = torch.full((shape.seqlen, shape.seqlen), -math.inf).triu(1)
        self.mask = hidden.to(DEVICE, dtype) if case == "mask" else None
        self.dropout = DROPOUT if case == "dropout" else 0.0
        # The largest power of two below an eighth of the number of errors: gradients of the output are an eighth to a quarter of an error.
        self.loss_scale = 2.0 ** max(0, math.floor(math.log2(self.x.numel() / 8)))


Attend = Callable[[Problem, Any, Any, Any], Any]


def standard(problem: Problem, query: Any, key: Any, value: Any) -> Any:
    """Of (batch, heads, seqlen, head_dim)."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    scores = scores if problem.mask is None else scores + problem.mask
    return F.dropout(scores.softmax(-1), problem.dropout) @ value


def sdpa(problem: Problem, query: Any, key: Any, value: Any) -> Any:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=problem.mask, dropout_p=problem.dropout)


def flash_attn(problem: Problem, query: Any, key: Any, value: Any) -> Any:
    function = importlib.import_module("flash_attn").flash_attn_func
    out = function(*(x.transpose(1, 2) for x in (query, key, value)), dropout_p=problem.dropout)
    return out.transpose(1, 2)


class Projected(nn.Module):
    """Multi-head attention around a function of four dimensions."""

    def __init__(self, problem: Problem, attend: Attend) -> None:
        super().__init__()
        self._problem, self._attend = problem, attend
        self.weights = nn.ParameterList([nn.Parameter(weight.clone()) for weight in problem.weights])

    def forward(self, x: Any) -> Any:
        query, key, value = (
            F.linear(x, weight).unflatten(-1, (self._problem.shape.num_heads, -1)).transpose(1, 2) for weight in self.weights[:3]
        )
        return F.linear(self._attend(self._problem, query, key, value).transpose(1, 2).flatten(2), self.weights[3])


class OfTorch(nn.Module):
    """torch's module, or ours in its place, with the same parameters."""

    def __init__(self, problem: Problem, kind: type[nn.MultiheadAttention]) -> None:
        super().__init__()
        shape, self._mask = problem.shape, problem.mask
        self.inner = kind(shape.width, shape.num_heads, problem.dropout, bias=False, batch_first=True, device=DEVICE, dtype=problem.dtype)
        with torch.no_grad():
            self.inner.in_proj_weight.copy_(torch.cat(problem.weights[:3]))
            self.inner.out_proj.weight.copy_(problem.weights[3])

    def forward(self, x: Any) -> Any:
        return self.inner(x, x, x, attn_mask=self._mask, need_weights=False)[0]


def steps_in_torch(problem: Problem, model: nn.Module) -> Callable[[], Any]:
    """A step of training; it returns the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE / problem.loss_scale)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = F.mse_loss(model(problem.x).float(), problem.target.float())
        (problem.loss_scale * loss).backward()
        optimizer.step()
        return loss.detach()

    return step


def steps_on_arrays(problem: Problem) -> Callable[[], Any]:
    """The same without torch."""
    if problem.dtype is torch.bfloat16:
        raise NotImplementedError("products of bfloat16 need a framework; float16 and float32 do not")
    library: Any = importlib.import_module("cupy") if ON_GPU else numpy

    def array(tensor: Any) -> Any:
        return library.asarray(tensor.cpu().numpy())

    shape, dtype = problem.shape, str(problem.dtype).removeprefix("torch.")
    x, target = (array(tensor).reshape(-1, shape.width) for tensor in (problem.x, problem.target))
    weights = [array(weight).astype("float32") for weight in problem.weights]
    options: dict[str, Any] = {} if problem.mask is None else {"attn_mask": array(problem.mask)}
    heads, done = (shape.batch, shape.seqlen, shape.num_heads, shape.width // shape.num_heads), 0

    def step() -> Any:
        nonlocal done
        done += 1
        if problem.dropout:
            options.update(dropout_p=problem.dropout, dropout_seed=(SEED, done))
        own = [weight.astype(dtype) for weight in weights]
        query, key, value = ((x @ weight.T).reshape(heads) for weight in own[:3])
        out, lse = cuflash.scaled_dot_product_attention(query, key, value, return_lse=True, **options)
        attended = out.reshape(x.shape)
        error = (attended @ own[3].T).astype("float32") - target.astype("float32")
        grad = (error * (2 * problem.loss_scale / error.size)).astype(dtype)
        grads = cuflash.scaled_dot_product_attention_backward((grad @ own[3]).reshape(heads), query, key, value, out, lse, **options)
        of_weights = [grad_of.reshape(x.shape).T @ x for grad_of in grads] + [grad.T @ attended]
        for weight, gradient in zip(weights, of_weights, strict=True):
            weight -= RATE / problem.loss_scale * gradient.astype("float32")
        return (error * error).mean()

    return step


def step_of(way: str, problem: Problem) -> Callable[[], Any]:
    """A step of a way.

    Raises:
        NotImplementedError, ImportError: it cannot do the case here.
    """
    if way == "arrays":
        return steps_on_arrays(problem)
    if way == "flash-attn":
        importlib.import_module("flash_attn")
        if problem.mask is not None or problem.dtype is torch.float32:
            raise NotImplementedError("it knows no mask" if problem.mask is not None else "it takes 16-bit types")
    attend: dict[str, Attend] = {"standard": standard, "sdpa": sdpa, "flash-attn": flash_attn}
    kinds = {"torch": nn.MultiheadAttention, "cuflash": cuflash.torch.MultiheadAttention}
    model = Projected(problem, attend[way]) if way in attend else OfTorch(problem, kinds[way])
    return steps_in_torch(problem, model)


def run(way: str, case: str, shape: Shape, dtype: torch.dtype, count: int) -> Result:
    """Train for so many steps; what one way fails at keeps no other from running."""
    torch.manual_seed(SEED)
    problem = Problem(shape, case, dtype)
    try:
        step = step_of(way, problem)
        losses = [step()]  # compiles
        microseconds = timed(lambda: losses.extend(step() for _ in range(count)))
        return Result(way, case, shape, microseconds, tuple(map(float, losses)))
    except (ImportError, RuntimeError, MemoryError) as error:  # it cannot do the case; or no memory, or a library's error
        return Result(way, case, shape, note=str(error).partition("\n")[0])


def timed(work: Callable[[], Any]) -> float:
    """Microseconds, of the GPU where there is one."""
    if not ON_GPU:
        begun = time.perf_counter()
        work()
        return 1e6 * (time.perf_counter() - begun)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * float(start.elapsed_time(end))


def apart(result: Result, judge: Result) -> float | None:
    """The largest difference of the losses of a step from those of the standard way; None where they may differ."""
    if result.case == "dropout" or not result.losses or not judge.losses:
        return None
    return max(abs(own - other) for own, other in zip(result.losses, judge.losses, strict=True))


def table(results: Sequence[Result]) -> str:
    """A line for each way of each case."""
    text = []
    judges = {(result.shape, result.case): result for result in results if result.way == "standard"}
    for result in results:
        judge = judges.get((result.shape, result.case))
        what = f"{result.shape.batch} x {result.shape.seqlen} x {result.shape.width}  {result.case:8} {result.way:11}"
        if result.microseconds is None:
            text.append(f"{what} {'–':>10}  {result.note}")
            continue
        faster = f"{judge.microseconds / result.microseconds:6.2f}x" if judge is not None and judge.microseconds else ""
        distance = None if judge is None else apart(result, judge)
        said = "" if distance is None else f", at most {distance:.1e} from standard"
        text.append(f"{what} {result.microseconds:10.0f} {faster}  loss {result.losses[0]:.5f} to {result.losses[-1]:.5f}{said}")
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, help="(default 100; 4 with --small)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(default float16 on a GPU, else float32)")
    parser.add_argument("--small", action="store_true", help="a tiny input")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to FILE")
    options = parser.parse_args(arguments)
    if not ON_GPU and not options.small:
        parser.error("there is no GPU here: --small tests this program on the simulator")
    dtype = getattr(torch, options.dtype or ("float16" if ON_GPU else "float32"))
    count = options.steps or (4 if options.small else 100)
    where = torch.cuda.get_device_name() if ON_GPU else "the simulator, whose times mean nothing"
    print(f"microseconds of {count} steps, {str(dtype).removeprefix('torch.')}, on {where}; times faster than standard")
    results = [
        run(way, case, shape, dtype, count)
        for shape in (SMALL if options.small else FULL)
        for case in options.cases
        for way in options.ways
    ]
    print(table(results))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
