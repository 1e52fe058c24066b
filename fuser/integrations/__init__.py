"""Hooks into other libraries; importing them does not import those libraries."""

from __future__ import annotations

from fuser.integrations import transformers

__all__ = ["transformers"]
