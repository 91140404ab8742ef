"""From what a caller passes to a checked `Problem`: every check of a user's input. Touches no array's values, no GPU and no compiler."""
