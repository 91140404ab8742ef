"""A plan is loaded, prepared and launched; a call that was seen before runs as it was prepared."""
