"""From a kernel's text and the lines of its `struct Config` to machine code, compiled once and kept."""
