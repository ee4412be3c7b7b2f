"""Makes Triton's interpreter faster in the tests."""

import functools
import inspect


def patch_once_a_launch() -> None:
    """Keeps the interpreter from looking for what to patch in each call of a function, 40 % of its time.

    A launch patches `triton.language` for as long as it runs. Each function that the kernel calls would do it again,
    and find all of it patched, unless the function imports another module of the language. In versions of Triton that
    are built differently nothing changes.
    """
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch, patched = interpreter._patch_lang, set()

    class Launch(interpreter._LangPatchScope):
        def restore(self):
            super().restore()
            patched.clear()

    @functools.cache
    def languages(function):
        modules = filter(inspect.ismodule, function.__globals__.values())
        return {each.__name__ for each in modules if each in (language, language.core)}

    def patch_once(function):
        if languages(function) <= patched:
            return interpreter._LangPatchScope()
        scope = patch(function)
        patched.update(languages(function))
        scope.__class__ = Launch
        return scope

    interpreter._patch_lang = patch_once
