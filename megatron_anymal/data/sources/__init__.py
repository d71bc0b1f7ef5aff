"""Data sets in the layouts that their makers publish: one file per layout, listed in the registry."""
