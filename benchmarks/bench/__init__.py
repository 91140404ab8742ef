"""What `benchmarks/bench_attention.py` is made of, each module using those above it only.

cases        what is timed, and how many scores and FLOP it has
report       columns and rows of CSV files
machine      where everything runs: names, versions, sensors
timing       how long a call takes
operands     the arrays of a case, and the truth about it in float64
memory       how much a call takes
calls        what one library does for one case, and cuflash's own calls
triton_attention, torch_libraries, libraries    cuflash's peers on these arrays
compilation  compiling ahead what a run needs
comparison   --quick, --full, --features: libraries side by side
tile_sweep   --tiles
host         --host
facts        --facts
single       --one and --worst
first_call   the first call of a new process
suite        what pytest measures
"""
