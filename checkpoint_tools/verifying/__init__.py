"""Implementation of verify."""
