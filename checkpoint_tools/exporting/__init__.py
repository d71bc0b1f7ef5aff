"""Implementation of export_hf."""
