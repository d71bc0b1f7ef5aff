"""Fuzz the readers with mutated shards, manifests, media and checkpoints; each must be read, named or refused."""
