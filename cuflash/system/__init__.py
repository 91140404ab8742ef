"""What the package uses of the operating system: private files, locks, the cache's directory and limit, threads. Knows nothing of kernels."""
