"""A timing model of GPUs that runs the assembler's own machine code: how fast a kernel would be, and why, without a GPU.

    sass.py           a cubin -> instructions with their control codes
    control_flow.py   loops, and the steady-state trace of each
    operations.py     instruction -> unit, clocks, latency, what it waits for
    multiprocessor.py one SM that runs a trace
    visits.py         how many tiles each block visits, by what the data say
    grid.py           all SMs: waves, unequal blocks, tails
    machine.py        the constants, each with its source
    description.py    what is known of a kernel besides its code; NAME.cubin and NAME.json
    prediction.py     kernels and calls -> predictions
    report.py         predictions as text and JSON

docs/timing.md says how far to trust it. Kernels of `mma.sync` are modelled; those of wgmma are not yet (`operations._NOT_MODELLED`).
"""
