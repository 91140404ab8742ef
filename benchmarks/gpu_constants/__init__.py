"""What `constants.py` consists of: the kernels' programs, the machines that run them, and the measurements."""
