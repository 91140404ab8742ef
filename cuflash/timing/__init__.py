"""A timing model of GPUs that runs the assembler's own machine code: how fast a kernel would be, and why, without a GPU.

    sass.py           a cubin -> instructions with their control codes
    control_flow.py   loops, and the steady-state trace of each
    addresses.py      the constants that an address is made of
    roles.py          warps that run different code, and the mbarriers at which they meet
    staying.py        what a tile of queries costs a block that stays beside its trips
    operations.py     instruction -> unit, clocks, latency, what it waits for
    tensor_unit.py    the unit that computes wgmma by itself
    phases.py         mbarriers while the model runs
    multiprocessor.py one SM that runs traces
    limits.py         the same traces without one limit
    visits.py         how many tiles each block visits, by what the data say
    grid.py           all SMs: waves, unequal blocks, tails
    machine.py        the constants, each with its source
    description.py    what is known of a kernel besides its code; NAME.cubin and NAME.json
    prediction.py     kernels and calls -> predictions
    report.py         predictions as text and JSON

docs/timing.md says how far to trust it.
"""
