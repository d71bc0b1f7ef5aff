"""What export_hf consists of."""
