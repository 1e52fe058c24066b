"""Toolchains, builds, the kernel cache, loading and executing programs."""
