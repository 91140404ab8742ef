"""What is known of devices: limits, and how many blocks fit."""
