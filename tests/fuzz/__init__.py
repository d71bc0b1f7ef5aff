"""Fuzz the readers with mutated shards, manifests, media and checkpoints: a file must be read, named or refused."""
