"""What import_hf consists of."""
