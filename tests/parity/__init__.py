"""Every parallel layout against AnyMAL pre-training written from its definitions."""
