"""What verify consists of."""
