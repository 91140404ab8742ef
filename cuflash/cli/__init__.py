"""What `python -m cuflash` prints."""
