"""The model, its configuration and its processor for transformers, and the copying of their code into exported folders.

The code in an exported folder runs without this package: `remote_code` copies it with everything that it imports.
"""
