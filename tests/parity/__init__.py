"""Compare every parallel layout with a plain-torch implementation of AnyMAL's training jobs."""
