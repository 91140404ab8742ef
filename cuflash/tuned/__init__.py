"""Tables of tiles that were timed on a GPU, in files: what a table says, where tables lie, and which of their tiles suits a call. Knows no kernel's insides."""
