"""Hooks into other libraries; importing them does not import those libraries."""

from __future__ import annotations

from fuser.integrations import sentence_transformers, transformers

__all__ = ["sentence_transformers", "transformers"]
