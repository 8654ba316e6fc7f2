"""Replace methods of one module instance, and tell whose methods an instance runs.

Trainers and libraries replace forwards too: on the class (patches of trainers, Liger), in a
subclass, or on the instance (accelerate's hooks). A method that `attach` would bypass must be
transformers' own, or what the other library does would be dropped without a word.
"""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable, Iterator
from functools import partial, wraps
from multiprocessing.reduction import ForkingPickler
from types import FunctionType, MethodType
from typing import Any

import torch

Method = Callable[..., Any]


def bind(module: torch.nn.Module, name: str, function: Method) -> None:
    """Replace a method of one instance by `function`, whose first argument is the instance.

    accelerate's hook keeps running around a forward that is replaced beneath it.
    """
    # A method, not a partial, which `torch.compile` compares by identity: each of many equal layers
    # would have a graph of its own. A deep copy is bound to its own module; `_reduce` pickles it.
    setattr(module, _slot(module, name), MethodType(function, module))


def as_method_of(cls: type, name: str, function: Method) -> Method:
    """Return `function`, which is called by keywords, under the signature of a class's method.

    transformers' heads call their base model with arguments by position, and trainers read from the
    signature which columns a model takes. The same for the same class.
    """
    key = cls, name, function
    if key not in _UNDER_SIGNATURE:
        own = getattr(cls, name)
        names = _positional(own)[1:]  # without `self`

        @wraps(own)
        def method(self: object, *args: object, **kwargs: object) -> Any:
            if len(args) > len(names):
                raise TypeError(f"{name} takes {len(names)} arguments, not {len(args)}")
            return function(self, **dict(zip(names, args, strict=False)), **kwargs)

        method.__module__ = function.__module__
        # Not `__wrapped__`, by which accelerate finds the way back to what it has wrapped.
        del method.__wrapped__
        method.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
        method.mrope_made_of = function, name  # type: ignore[attr-defined]
        _UNDER_SIGNATURE[key] = method
    return _UNDER_SIGNATURE[key]


def _positional(function: Method) -> tuple[str, ...]:
    """Return the names of what a function takes by position."""
    taken = inspect.signature(function).parameters.values()
    return tuple(one.name for one in taken if one.kind is one.POSITIONAL_OR_KEYWORD)


_UNDER_SIGNATURE: dict[tuple[type, str, Method], Method] = {}


def unbind(module: torch.nn.Module, name: str) -> None:
    """Undo `bind`; leave what another library has put in its place since."""
    slot = _slot(module, name)
    if not is_bound(vars(module).get(slot)):
        return
    if slot == name:
        delattr(module, name)
    else:  # the hook calls what is in its slot, so the slot must not be empty
        setattr(module, slot, MethodType(getattr(type(module), name), module))


def is_bound(found: object) -> bool:
    """Whether a method of an instance is one that `bind` put there."""
    return _is_ours(getattr(found, "__func__", None))


def _is_ours(function: object) -> bool:
    # Not `_module_of`: some are decorated by transformers.
    return str(getattr(function, "__module__", "")).startswith("mrope.hf.")


def _reduce(method: MethodType) -> Any:
    """Pickle a method that `bind` made by its function; any other by its name, as Python does."""
    function: Any = method.__func__
    if not _is_ours(function):
        return method.__reduce__()
    if hasattr(function, "mrope_made_of"):
        return _make_method, (method.__self__, *function.mrope_made_of)
    return _make_method, (method.__self__, function)


def _make_method(
    module: torch.nn.Module, function: Method, signature_of: str | None = None
) -> MethodType:
    if signature_of is not None:
        function = as_method_of(type(module), signature_of, function)
    return MethodType(function, module)


# Python looks a method up by its name in its instance, whose class has none of that name.
copyreg.pickle(MethodType, _reduce)
ForkingPickler.register(MethodType, _reduce)


def find_foreign(module: torch.nn.Module, name: str = "forward") -> str | None:
    """Describe the method that runs in place of transformers' own; None if that one runs."""
    return foreign_on_instance(module, name) or foreign_on_class(type(module), name)


def foreign_on_instance(module: torch.nn.Module, name: str = "forward") -> str | None:
    """Describe the method that was set on this instance alone; None if its class's runs.

    accelerate's hooks are no such method: what they call is looked at.
    """
    found = vars(module).get(_slot(module, name))
    # Another attached model may share the module.
    if found is None or is_bound(found):
        return None
    # accelerate leaves the class's own method on the instance when it removes a hook.
    own = getattr(found, "__self__", None) is module
    if own and getattr(found, "__func__", None) is getattr(type(module), name, None):
        return None
    return f"{name} of this {type(module).__name__} is {_describe(found)}"


def foreign_on_class(cls: type, name: str = "forward") -> str | None:
    """Describe the method of a class that is not of the file of transformers that defines it.

    Decorators count: one of another library may do anything before and after.
    """
    owner = next((one for one in cls.__mro__ if name in vars(one)), None)
    if owner is None:
        return None
    chain = list(_unwrap(vars(owner)[name]))
    modules = [_module_of(function) for function in chain]
    decorators = ("transformers.", "torch.utils._contextlib")
    own = owner.__module__.startswith("transformers.") and modules[-1] == owner.__module__
    if own and all(module.startswith(decorators) for module in modules):
        return None
    return f"{owner.__name__}.{name} is {_describe(chain[0])}"


def copies(module: torch.nn.Module) -> Iterator[Any]:
    """Yield a module, or both copies of it where PEFT's `modules_to_save` keeps two.

    One copy is trained, the other runs while the adapter is disabled; each adapter adds one.
    """
    if is_wrapper(module):
        yield module.original_module
        yield from module.modules_to_save.values()  # type: ignore[operator]
    else:
        yield module


def is_wrapper(module: torch.nn.Module) -> bool:
    """Whether a module is PEFT's wrapper of `modules_to_save`."""
    # In `_modules`: the wrapper passes other attributes on to the copy that is active.
    return {"original_module", "modules_to_save"} <= module._modules.keys()  # noqa: SLF001


def _slot(module: torch.nn.Module, name: str) -> str:
    """Return the attribute that holds an instance's method: accelerate's hooks move a forward."""
    if name != "forward" or "_old_forward" not in vars(module):
        return name
    hooked = vars(module).get("forward")
    is_hook = isinstance(hooked, partial) and _module_of(hooked.func) == "accelerate.hooks"
    return "_old_forward" if is_hook else name


def _unwrap(function: object) -> Iterator[Any]:
    """Yield a function and those that it decorates, the innermost last."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _module_of(function: object) -> str:
    """Return the module whose code a function is; `functools.wraps` hides it in `__module__`."""
    if isinstance(function, FunctionType):
        name: str = function.__globals__.get("__name__", "")
        return name
    return getattr(function, "__module__", None) or type(function).__module__


def _describe(function: object) -> str:
    """Return the name of a function's code and its module, as an error gives it."""
    if isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    name = getattr(code, "co_name", None) or type(function).__name__
    return f"`{name}` of {_module_of(function) or 'unknown code'}"
