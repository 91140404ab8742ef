"""There is no torch beside the stand-in: a torch without CUDA would be another machine."""

raise ImportError("the stand-in of a GPU has no torch")
