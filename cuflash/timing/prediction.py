"""From kernels to predicted times.

`predict_kernel(function, description)` runs the hot loop of one kernel on the model of an SM: its share of the matrix rate, what binds, what it would be
without each limit. `predict_plan(plan, card)` compiles the kernels of a call, predicts each and lays its grid out on the card: milliseconds and TFLOP/s.

Where data hide some pairs of a tile, the kernel takes another path through it (`masked`), which is predicted too; how many tiles are visited either way follows from
the arrays of the call (`visits.py`). Kernels that walk over no tiles, such as `backward_delta`, take the time of their traffic from and to memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from cuflash.errors import UnsupportedError
from cuflash.hardware import device, occupancy
from cuflash.hardware.device import Device
from cuflash.jit import cache
from cuflash.jit.compiler import CompileRequest, KernelResources
from cuflash.planning import kernel_specs, key_parts
from cuflash.planning.block_order import in_order
from cuflash.planning.kernel_cases import KernelCase, conversion_bytes, converts_sums, multiply_adds
from cuflash.planning.kernel_plan import KernelPlan
from cuflash.planning.plan import Plan
from cuflash.problem.problem import Problem
from cuflash.timing import splits, traffic
from cuflash.timing.control_flow import Trace, is_matrix, is_wgmma, steady_trace, tile_loop
from cuflash.timing.description import Description
from cuflash.timing.grid import clocks_of_memory_grid, grid_clocks
from cuflash.timing.limits import LIMITS, without
from cuflash.timing.machine import Card, Multiprocessor, multiprocessor
from cuflash.timing.multiprocessor import steady_clocks_of_roles
from cuflash.timing.operations import MULTIPLY_ADDS, Operation, Role, busy_clocks_of_block, operations
from cuflash.timing.roles import helps, meeting_points, role_traces
from cuflash.timing.sass import Function, read_functions
from cuflash.timing.staying import single_tile_traces
from cuflash.timing.visits import NO_DATA, Data, visits_of_launch

WARPGROUP_WARPS = 4


@dataclass(frozen=True)
class KernelPrediction:
    """The steady state of one kernel on one SM.

    Attributes:
        description: of the kernel.
        blocks: resident on the SM.
        instructions, matrix: of one warp in one trip, all and matrix products.
        clocks: of the SM for one trip of all its resident blocks.
        busy: share of the time for which each resource is busy, by name.
        speedups: how many times faster it would be without a limit, by the limit's name; empty if that was not asked for.
        roles: the operations, for those who go on with them; first those of the warps that compute.
        l2_bytes: per clock and SM, which "l2" is a share of.
        between_tiles: clocks that a tile of queries takes beside its trips, of a block that stays; None where blocks do not.
        between_parts: the same of a tile whose keys blocks share out (planning/key_shares.py), with the storing of a part and the merging of one; None where none is.
        idle_cost: of such a block, what a trip in which a warpgroup has nothing to do costs, as a part of one in which all have.
    """

    description: Description
    blocks: int
    instructions: int
    matrix: int
    clocks: float
    busy: Mapping[str, float]
    speedups: Mapping[str, float]
    roles: tuple[Role, ...]
    l2_bytes: float
    between_tiles: float | None = None
    between_parts: float | None = None
    idle_cost: float = 0.0

    @property
    def trace(self) -> tuple[Operation, ...]:
        """One trip of a warp that computes."""
        return self.roles[0].trace

    @property
    def matrix_share(self) -> float:
        """Share of the matrix rate that it reaches."""
        return self.busy["matrix"]

    @property
    def binds(self) -> str:
        """The limit without which it would gain the most; without those, the busiest resource."""
        of = self.speedups or self.busy
        return max(of, key=lambda name: of[name])


def predict_kernel(
    function: Function,
    description: Description,
    *,
    limits: bool = True,
    masked: bool = False,
    in_turn: bool = False,
    staying: bool = True,
    machine: Multiprocessor | None = None,
    trips: int | None = None,
    warming: int = 1,
) -> KernelPrediction:
    """Run a kernel's loop over tiles in its steady state.

    Args:
        function: its machine code.
        description: what it is.
        limits: also run it without each limit in turn, which takes several times as long.
        masked: every tile has hidden pairs.
        in_turn: the tensor unit serves warps in turn, which is not what was measured on an H100.
        staying: also find out what `lay_out` needs of blocks that stay.
        machine: the SM, in the place of what is known of the architecture's.
        trips: of the run without limits lifted; None for a few.
        warming: trips of it before clocks are counted.

    Raises:
        OptionError: nothing is known of the architecture.
        UnsupportedError: the code has no loop, or instructions that are not modelled.
    """
    machine = machine or multiprocessor(description.arch)
    traces = role_traces(function, _trace(function, description, masked=masked))
    roles = _roles(function, traces, description, machine)
    blocks = resident_blocks(description, warps=max(role.first + role.warps for role in roles))
    clocks = steady_clocks_of_roles(roles, machine, blocks=blocks, in_turn=in_turn, trips=trips, warming=warming)
    busy = {name: value * blocks / clocks for name, value in busy_clocks_of_block(roles, machine).items()}
    speedups = {}
    for limit in LIMITS if limits else ():
        lifted = tuple(replace(role, trace=without(role.trace, limit)) for role in roles)
        if lifted != roles:
            speedups[limit] = clocks / steady_clocks_of_roles(lifted, machine, blocks=blocks, in_turn=in_turn)
    stays = staying and kernel_specs.TILED_KERNELS[description.kernel].stays
    between = {}  # whether a tile is shared out -> clocks
    for shared in (False, True) if len(roles) > 1 and stays else ():
        if (single := single_tile_traces(function, traces, shared=shared)) is not None:
            of_single = _roles(function, single, description, machine)
            between[shared] = max(0.0, steady_clocks_of_roles(of_single, machine, blocks=blocks, in_turn=in_turn) - clocks)
    idle_cost = _idle_cost(roles, machine, clocks) if between else 0.0
    return KernelPrediction(
        description,
        blocks,
        len(roles[0].trace),
        traces[0].num_matrix,
        clocks,
        busy,
        speedups,
        roles,
        machine.l2_bytes,
        between.get(False),
        between.get(True),
        idle_cost,
    )


def _idle_cost(roles: Sequence[Role], machine: Multiprocessor, clocks: float) -> float:
    """If the clocks of a trip grow evenly from one warpgroup to all of them: what those lose who have nothing to do, since others take longer than their share."""
    warpgroups = roles[0].warps // WARPGROUP_WARPS
    alone = steady_clocks_of_roles([replace(roles[0], warps=WARPGROUP_WARPS), *roles[1:]], machine, blocks=1)
    return max(0.0, (warpgroups * alone / clocks - 1) / max(1, warpgroups - 1))


def _roles(function: Function, traces: Sequence[Trace], description: Description, machine: Multiprocessor) -> tuple[Role, ...]:
    """The warps of a block: those that compute, and in front of them a warpgroup of which one warp copies and others keep watch."""
    if len(traces) == 1:
        return (Role(operations(traces[0].instructions, machine), description.tile.num_warps),)
    meetings = meeting_points(function, traces)
    helping = [helps(trace) for trace in traces]
    computing, *others = (operations(trace.instructions, machine, of) for trace, of in zip(traces, meetings, strict=True))
    own_warps = description.tile.num_warps // (1 + sum(helping))
    watching = [Role(trace, 1, place) for place, trace in enumerate(trace for trace, of in zip(others, helping[1:], strict=True) if not of)]
    first = WARPGROUP_WARPS + own_warps
    helped = [Role(trace, own_warps, first) for trace, of in zip(others, helping[1:], strict=True) if of]
    return Role(computing, own_warps, WARPGROUP_WARPS), *watching, *helped


def resident_blocks(description: Description, warps: int | None = None) -> int:
    """Blocks of the kernel that an SM holds, whose warps are those of the tile, or `warps`.

    Raises:
        UnsupportedError: not one.
    """
    resident = occupancy.occupancy(
        device.of_arch(description.arch),
        threads=32 * (warps or description.tile.num_warps),
        registers=description.registers,
        shared_bytes=description.shared_bytes,
        barriers=description.barriers,
    )
    if not resident.blocks:
        hint = "Choose a smaller tile."
        raise UnsupportedError("tile", f"a block that wants too much of {resident.limiter}", f"one that {description.arch} can hold", hint)
    return resident.blocks


def _trace(function: Function, description: Description, *, masked: bool) -> Trace:
    loop = tile_loop(function)
    if masked and any(map(is_wgmma, function[loop.head : loop.last])):
        loop = tile_loop(function, masked=True)  # masked tiles have a loop of their own
    matrix = next((i for i in function[loop.head : loop.last] if is_matrix(i)), None)
    if matrix is None:
        return steady_trace(function, loop, masked=masked)
    per_instruction = next((MULTIPLY_ADDS[part] for part in matrix.opcode.split(".") if part in MULTIPLY_ADDS), 0)
    spec = kernel_specs.TILED_KERNELS[description.kernel]
    case = KernelCase(spec, description.dtype, description.head_dim, False, description.head_dim_v)
    of_block = multiply_adds(case, description.tile, device.of_arch(description.arch))
    known = per_instruction and description.dtype != "float32"  # of which a product is one instruction or three
    expected = of_block // (per_instruction * description.tile.num_warps) if known else None
    return steady_trace(function, loop, expected, masked=masked)


# --- A call -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One kernel of a call.

    Attributes:
        name: of the kernel.
        milliseconds: that it takes.
        kernel: its steady state; None for kernels that walk over no tiles.
        num_blocks: of its grid.
        tiles_visited: by all blocks together.
        tiles_partial: of those, in which data hide some pair.
        partial_cost: clocks of such a tile over those of the others.
        clock_ghz: that the card keeps under it.
        memory_binds: its operands and results take longer to and from memory than all else.
        balance: the time that the tiles alone would take if all SMs were busy to the end, over the time that it takes.
        evenness: likewise, with each block's begin and end: what the order of blocks and waves leave of the time.
    """

    name: str
    milliseconds: float
    kernel: KernelPrediction | None
    num_blocks: int
    tiles_visited: int
    balance: float
    evenness: float
    tiles_partial: int = 0
    partial_cost: float = 1.0
    clock_ghz: float = 0.0
    memory_binds: bool = False

    @property
    def binds(self) -> str:
        """Memory, or what binds its steady state."""
        return "memory" if self.kernel is None or self.memory_binds else self.kernel.binds


@dataclass(frozen=True)
class Prediction:
    """A whole call.

    Attributes:
        plan: what would run.
        card: where.
        launches: its kernels.
    """

    plan: Plan
    card: Card
    launches: tuple[Launch, ...]

    @property
    def milliseconds(self) -> float:
        """Of all kernels, one after the other."""
        return sum(launch.milliseconds for launch in self.launches)

    @property
    def tflops(self) -> float:
        """By the products over visible pairs, as benchmarks count; where data hide pairs, more than there are."""
        problem = self.plan.problem
        flops = problem.flops_backward if self.plan.backward or problem.of_tangents else problem.flops_forward
        return flops / (self.milliseconds * 1e9) if self.launches else 0.0


def predict_plan(plan: Plan, card: Card, *, limits: bool = True, data: Data = NO_DATA, in_turn: bool = False) -> Prediction:
    """Compile the kernels of a plan (through the cache) and predict the time of each.

    Args:
        plan: of the call.
        card: where it would run.
        limits: also predict each kernel without each limit.
        data: the arrays of the call that decide which tiles are visible, as NumPy arrays by the names of the arguments (`visits.py`).
        in_turn: as in `predict_kernel`.

    Raises:
        UnsupportedError: such an array is missing, or a kernel is not modelled.
        SetupError: nvdisasm is missing.
    """
    return Prediction(plan, card, tuple(_predict_launch(kernel, plan, card, limits, data, in_turn) for kernel in plan.kernels))


def _predict_launch(kernel: KernelPlan, plan: Plan, card: Card, limits: bool, data: Data, in_turn: bool) -> Launch:
    if kernel.spec == kernel_specs.FORWARD_SPLIT:
        return _predict_split(kernel, plan, card, limits, data)
    if kernel.spec == kernel_specs.MERGE_ATTENTION:
        number = next(splits.parts_of_row(of, plan.problem, data) for of in plan.kernels if of.spec.splits_keys)
        return _short_launch(kernel, card, splits.clocks_of_merge(kernel, plan.problem, multiprocessor(card.arch), card, number))
    if kernel.spec == kernel_specs.CACHE_APPEND:
        return _short_launch(kernel, card, splits.clocks_of_append(kernel, plan.problem, multiprocessor(card.arch), card))
    if kernel.spec == kernel_specs.PACKED_TILES:
        return _short_launch(kernel, card, _clocks_of_list(plan.problem, multiprocessor(card.arch), card))
    if not kernel.spec.is_tiled or kernel.spec == kernel_specs.BACKWARD_ROW_SUMS:
        return predict_without_tiles(kernel, plan, card)
    described, function = compiled(kernel, plan.device, causal=plan.problem.is_causal)
    predicted = predict_kernel(function, described, limits=limits, in_turn=in_turn)
    lists = kernel.spec.walks_lists and plan.problem.features.kinds.lists_tiles
    apart = lists or len(predicted.roles) > 1
    masked = predict_kernel(function, described, limits=False, masked=True, in_turn=in_turn, staying=False) if apart else None
    return lay_out(predicted, kernel, plan.problem, card, data=data, masked=masked)


def _predict_split(kernel: KernelPlan, plan: Plan, card: Card, limits: bool, data: Data) -> Launch:
    """Keys of a cache, from memory (`splits.py`), which is full where `data` does not say its lengths."""
    problem = plan.problem
    described, function = compiled(kernel, plan.device, causal=problem.is_causal)
    resident = resident_blocks(described)
    together = min(kernel.num_blocks, resident * card.num_sms)
    of_arch = multiprocessor(card.arch)
    shared = splits.memory_machine(of_arch, card, resident, together)
    predicted = _sustained(predict_kernel(function, described, limits=limits, machine=shared))
    alone = [splits.memory_machine(of_arch, card, blocks, blocks) for blocks in range(1, resident + 1)]  # with all of memory for one SM
    trip_clocks = [steady_clocks_of_roles(predicted.roles, machine, blocks=blocks) for blocks, machine in enumerate(alone, 1)]
    blocks = splits.walks_of_blocks(kernel, problem, data)
    overhead = splits.block_overhead(kernel, problem, shared, card)
    clocks = clocks_of_memory_grid(
        blocks, num_sms=card.num_sms, trip_clocks=trip_clocks, memory_clocks=splits.memory_clocks(kernel, problem, card), overhead=overhead,
        empty=card.block_start,
    )  # fmt: skip
    trips = [sum(block) for block in blocks]
    ideal = sum(trips) * predicted.clocks / predicted.blocks / card.num_sms
    even = ideal + overhead * sum(bool(walk) for block in blocks for walk in block) / predicted.blocks / card.num_sms
    seconds = card.kernel_start + clocks / (card.clock_ghz * 1e9)
    return Launch(
        kernel.name, 1e3 * seconds, predicted, kernel.num_blocks, round(sum(trips)), min(1.0, ideal / clocks), min(1.0, even / clocks), clock_ghz=card.clock_ghz,
        memory_binds=predicted.binds == "l2",
    )  # fmt: skip


def _sustained(predicted: KernelPrediction) -> KernelPrediction:
    """The same where no resource does more than it can: within few trips copies from memory may have begun that have not ended."""
    most = max(1.0, *predicted.busy.values())
    return replace(predicted, clocks=predicted.clocks * most, busy={name: share / most for name, share in predicted.busy.items()})


def _short_launch(kernel: KernelPlan, card: Card, clocks: float) -> Launch:
    """A kernel whose begin and end are most of it."""
    return Launch(kernel.name, 1e3 * (card.kernel_start + clocks / (card.clock_ghz * 1e9)), None, kernel.num_blocks, 0, 1.0, 1.0)


def _clocks_of_list(problem: Problem, machine: Multiprocessor, card: Card) -> float:
    """Of the kernel that lists the tiles of packed sequences: a lane reads the offsets of every 32nd, and stores."""
    return card.block_start + (1 + ceil(problem.sequences / 32)) * machine.global_latency


def _trip_clocks(predicted: KernelPrediction, machine: Multiprocessor) -> list[float]:
    """Of an SM for one trip of each of its blocks, with 1, 2, … of them: between one block and all of them, as many clocks more for each."""
    alone = steady_clocks_of_roles(predicted.roles, machine, blocks=1) if predicted.blocks > 1 else predicted.clocks
    return [alone + (predicted.clocks - alone) * index / max(1, predicted.blocks - 1) for index in range(predicted.blocks)]


def compiled(kernel: KernelPlan, on: Device, *, causal: bool) -> tuple[Description, Function]:
    """Compile a kernel, and read it."""
    request = replace(kernel.request(on), arch=on.compile_arch, target="cubin")
    artifact = cache.fetch(request)
    resources = artifact.resources_of(kernel.entry)
    return describe(kernel, resources, request, causal=causal), read_functions(artifact.data)[kernel.entry]


def describe(kernel: KernelPlan, resources: KernelResources, request: CompileRequest, *, causal: bool) -> Description:
    """What there is to know of a planned kernel once it is compiled."""
    return Description(
        kernel=kernel.name,
        arch=request.arch.rstrip("af"),
        dtype=kernel.dtype,
        head_dim=kernel.head_dim,
        head_dim_v=kernel.head_dim_v or kernel.head_dim,
        causal=causal,
        tile=kernel.tile,
        registers=resources.registers,
        spill_bytes=resources.spill_store_bytes,
        shared_bytes=kernel.shared_bytes + resources.static_shared_bytes,
        barriers=resources.barriers,
    )


def lay_out(
    predicted: KernelPrediction,
    kernel: KernelPlan,
    problem: Problem,
    card: Card,
    *,
    data: Data = NO_DATA,
    masked: KernelPrediction | None = None,
    machine: Multiprocessor | None = None,
) -> Launch:
    """The grid of a kernel on a card.

    Args:
        predicted: its steady state.
        kernel: as it is planned.
        problem: the call.
        card: where.
        data: as in `predict_plan`.
        masked: its steady state in tiles in which data hide some pair; None for the same.
        machine: the SM that `predicted` is of, in the place of what is known of the architecture's.

    Raises:
        UnsupportedError: which tiles a block visits depends on data that are not there.
    """
    visits = visits_of_launch(kernel, problem, data)
    cost = 1.0 if masked is None else masked.clocks / predicted.clocks
    weighed = {of: of.full + cost * of.partial + predicted.idle_cost * of.idle for of in {of for head in visits for of in head}}
    machine = machine or multiprocessor(predicted.description.arch)
    stays = predicted.between_tiles is not None
    overhead = predicted.between_tiles if predicted.between_tiles is not None else _block_overhead(kernel, problem, machine, card)
    waits = machine.global_latency if problem.num_sequences is not None else 0.0  # for offsets, which say that there is no more to do
    empty = card.block_start + waits if not stays else 0.0
    section = min(len(visits), kernel.section_heads)
    last_first = problem.is_causal and not kernel.spec.owns_keys and not kernel.packed_places
    launched = in_order(visits, section=section, last_first=last_first)
    trips = [weighed[of] for of in launched]
    trips = trips[: len(trips) - kernel.shares.tiles]
    if kernel.spec.added_up:
        _wait_for_each_other(
            trips, kernel, together=card.num_sms * predicted.blocks, section=section, tiles=kernel.num_tiles * kernel.splits.number
        )
    clocks = grid_clocks(trips, num_sms=card.num_sms, trip_clocks=_trip_clocks(predicted, machine), overhead=overhead, empty=empty)
    if stays:  # each once
        clocks += _block_overhead(kernel, problem, machine, card)
    if kernel.shares.tiles:  # of two tiles
        clocks += kernel.shares.length * predicted.clocks + 2 * (predicted.between_parts or overhead)
    counted = Counter(of for head in visits for of in head)
    total, partial = sum(of.total * count for of, count in counted.items()), sum(of.partial * count for of, count in counted.items())
    working, tiles = sum(count for of, count in counted.items() if of.total), counted.total()
    ideal = (total + (cost - 1) * partial) * predicted.clocks / predicted.blocks / card.num_sms
    even = ideal + (working * overhead + (tiles - working) * empty) / predicted.blocks / card.num_sms
    clock_ghz = card.clock_under(_share_of_peak(predicted, machine) * ideal / clocks)
    seconds, of_traffic = clocks / (clock_ghz * 1e9), traffic.least_bytes(kernel, problem) / card.memory_bytes_per_second
    return Launch(
        kernel.name,
        1e3 * max(seconds, of_traffic),
        predicted,
        kernel.num_blocks,
        round(total),
        ideal / clocks,
        even / clocks,
        round(partial),
        cost,
        clock_ghz,
        memory_binds=of_traffic > seconds,
    )


def _wait_for_each_other(trips: list[float], kernel: KernelPlan, *, together: int, section: int, tiles: int) -> None:
    """Blocks of one head, or chain, that start together add to their first tile one after the other, a trip apart. Later ones start so."""
    splits = kernel.splits.number
    of_chain = -(-kernel.num_tiles // max(1, kernel.splits.chains))
    for index in range(min(together, len(trips))):
        if trips[index]:
            trips[index] += index // section % tiles // splits % of_chain


def _share_of_peak(predicted: KernelPrediction, machine: Multiprocessor) -> float:
    """Of what the tensor cores can do at most, which products of mma.sync do not reach on an architecture with wgmma."""
    if machine.warpgroups is None or len(predicted.roles) > 1:
        return predicted.matrix_share
    return predicted.matrix_share * machine.matrix_rates["half"] / machine.warpgroups.multiply_adds


def _block_overhead(kernel: KernelPlan, problem: Problem, machine: Multiprocessor, card: Card) -> float:
    """Clocks of a block before and after its loop: it starts, waits for its first tiles, and stores its results."""
    tile, by_keys = kernel.tile, kernel.spec.owns_keys
    rows = tile.tile_kv if by_keys else tile.tile_q
    width = problem.itemsize * (problem.head_dim + problem.head_dim_v)
    first = (tile.tile_q + tile.tile_kv) * width
    stored = rows * (width if {"dK", "dV"} <= set(kernel.spec.outputs) else width / 2)
    converted = 0.0
    if kernel.splits.chains:
        stored = key_parts.part_bytes(kernel.case, tile)
    elif converts_sums(kernel.spec, problem):  # its own of all sums of dQ
        blocks = kernel.num_tiles * problem.key_shape[0] * problem.num_heads_kv
        converted = machine.copy_latency + conversion_bytes(problem) / blocks / machine.l2_bytes
    return card.block_start + machine.copy_latency + (first + stored) / machine.l2_bytes + converted


def predict_without_tiles(kernel: KernelPlan, plan: Plan, card: Card) -> Launch:
    """A kernel without matrix products, or one that seldom makes any.

    Raises:
        UnsupportedError: nothing is known of it.
    """
    if kernel.spec == kernel_specs.BACKWARD_DKDV_MERGE:  # of parts that lie in L2
        split = plan.kernels[plan.kernels.index(kernel) - 1]
        nbytes = split.num_blocks * key_parts.part_bytes(split.case, split.tile)
        return _short_launch(kernel, card, nbytes / multiprocessor(card.arch).l2_bytes / min(card.num_sms, kernel.num_blocks))
    return predict_traffic(kernel, plan.problem, card)


def predict_traffic(kernel: KernelPlan, problem: Problem, card: Card) -> Launch:
    """A kernel that takes the time of what it reads and writes.

    Raises:
        UnsupportedError: nothing is known of it.
    """
    seconds = traffic.bytes_of(kernel, problem) / card.memory_bytes_per_second
    return Launch(kernel.name, 1e3 * seconds, None, kernel.num_blocks, 0, 1.0, 1.0)
