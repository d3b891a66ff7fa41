"""Triton's interpreter without what it does again and again."""

from typing import Any


def install() -> None:
    """Have triton.language patched once: the interpreter does so at every call in a kernel, 5 ms each."""
    from triton.runtime import interpreter

    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = id(self.fn.__globals__)
        if names not in patched:
            patched.add(names)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
