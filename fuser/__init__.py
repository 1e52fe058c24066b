"""Operator fusion for sparse-transformer inference."""
