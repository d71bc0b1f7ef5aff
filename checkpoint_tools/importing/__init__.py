"""Implementation of import_hf."""
