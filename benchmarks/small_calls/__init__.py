"""What `benchmarks/sanitize.py` is made of, each module using those above it only.

cases      small calls that reach every kernel, element type and code path
arrays     their arrays on a device, and the calls themselves
judge      results against the formula in float64
checking   --check: the judge in a process that may hang or lose its GPU
compared   --simulator: a GPU beside the simulator
streams    --streams: whether calls run where and when they should
"""
