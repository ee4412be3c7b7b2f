"""Makes Triton's interpreter faster in the tests."""

import functools
import inspect


def make_faster() -> None:
    patch_once_a_launch()
    keep_types()


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


def keep_types() -> None:
    """Keeps the types of tensors: to make several in each operation takes half of the interpreter's time.

    A type is known by its name, which has the dtype of the elements and the sizes of the block.
    """
    from triton.language.core import block_type, tensor
    from triton.runtime import interpreter

    find, dtypes = interpreter._get_np_dtype, {}
    make_type, types = block_type.__init__, {}
    make_tensor, tensors = tensor.__init__, {}

    def dtype_of(kind):
        name = kind.scalar.name
        if name not in dtypes:
            dtypes[name] = find(kind)
        return dtypes[name]

    def init_type(self, element_ty, shape):
        name = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if name not in types:
            make_type(self, element_ty, shape)
            types[name] = vars(self).copy()
        vars(self).update(types[name])

    def init_tensor(self, handle, type):
        if type.name not in tensors:
            make_tensor(self, None, type)
            tensors[type.name] = vars(self).copy()
        vars(self).update(tensors[type.name], handle=handle)

    interpreter._get_np_dtype, block_type.__init__, tensor.__init__ = dtype_of, init_type, init_tensor
