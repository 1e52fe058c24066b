"""Kernel families: what each can fuse, its parameters, its cost and its PyTorch reference."""
