"""The autotuner: finds the fastest tiles of a GPU by timing them, and writes them into a table that plans look into (cuflash/tuned).

    described_calls.py   a call as numbers and small arrays, which another process can make again
    tasks.py             which kernels of which calls are tuned, and their candidates in order
    session.py           the loop over candidates: budget, resuming, interruption, what is kept
    measuring.py         one call on arrays of this process: results compared, kernels timed
    comparing.py         whether two results are the same but for rounding
    worker.py            the process that does so, which may crash
    checkout.py          which commit the library is of
    fitting.py           the timing model's constants from the times of tables
    progress.py          what a run says while it goes on, and its table of gains
    api.py               cuflash.autotune
    command.py           python -m cuflash autotune

Nothing here runs unless it is called: calls never tune.
"""
