"""The cache of programs keeps what has been used last."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from fuser.module.programs import ProgramCache


@given(st.lists(st.tuples(st.sampled_from(["use", "add", "remove"]), st.integers(0, 6))), st.integers(1, 4))
def test_it_is_a_bounded_dict_in_order_of_use(steps: list[tuple[str, int]], places: int) -> None:
    cache: ProgramCache[int, str] = ProgramCache(places)
    model: OrderedDict[int, str] = OrderedDict()
    for step, key in steps:
        if step == "use":
            assert cache.use(key) == model.get(key)
            if key in model:
                model.move_to_end(key)
        elif step == "add":
            full = key not in model and len(model) == places
            assert cache.add(key, str(key)) == ([next(iter(model.values()))] if full else [])
            model[key] = str(key)
            model.move_to_end(key)
            if full:
                model.popitem(last=False)
        else:
            cache.remove(key)
            model.pop(key, None)
        assert dict(cache.items()) == dict(model) and len(cache) == len(model) <= places
        assert (cache.oldest is None) == (len(model) < places)
        if cache.oldest is not None:
            assert cache.oldest == cache._taken[next(iter(model))].used
