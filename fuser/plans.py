"""Attention plans in the kernel cache on disk, so that a second process does not plan again."""

from __future__ import annotations

import logging

from fuser.ir.errors import CacheError
from fuser.runtime.cache import default_cache

logger = logging.getLogger("fuser")


class CachedPlans:
    """The plans of :func:`fuser.runtime.cache.default_cache`; a cache that cannot be used keeps none."""

    def read(self, key: str) -> bytes | None:
        try:
            return default_cache().read_plan(key)
        except (CacheError, OSError) as error:
            logger.debug("plans are not read: %s", error)
            return None

    def write(self, key: str, title: str, content: bytes) -> None:
        try:
            default_cache().write_plan(key, title, content)
        except (CacheError, OSError) as error:
            logger.debug("a plan is not kept: %s", error)
