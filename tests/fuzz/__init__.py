"""Mutated shards, manifests, media and checkpoints: each outcome is read, named or refused, or the fuzzer fails."""
