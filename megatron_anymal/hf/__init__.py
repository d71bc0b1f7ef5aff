"""The model, its configuration and its processor for transformers, and what puts their code into an exported folder.

What lies in such a folder runs where nothing of this package is installed: `bundle` copies it with all that it imports.
"""
