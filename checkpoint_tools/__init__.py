"""Tools for checkpoints, each run as `python -m checkpoint_tools.NAME`."""
