"""From a problem and a device to a `Plan`: which kernels, tiles, grids, memory. Pure."""
