"""What every ATen operator that fuser understands becomes; a handler that returns None leaves its node an extern."""

from fuser.frontend.aten import attention, elementwise, layout, products, rows
from fuser.frontend.aten.handlers import HANDLERS

__all__ = ["HANDLERS", "attention", "elementwise", "layout", "products", "rows"]
