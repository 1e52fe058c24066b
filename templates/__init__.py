"""Jinja sources of the kernels and the headers that they share."""
