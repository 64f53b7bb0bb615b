"""The names of our layers in saved models, by which files load also where fusedrnn is not imported.

A saved layer names a module and a class. Keras looks them up among the names that are registered for its own classes,
and then in the module itself. Keras's layers have the module ``keras.layers``. Ours have ``keras.src.layers``, and our
classes are registered under these names, under which the module has Keras's own classes. So a file with our layers
loads as our layers in a process that has imported :mod:`fusedrnn.keras`, and as Keras's layers in any other process. A
``.keras`` file with Keras's layers loads as Keras's layers everywhere. The names of custom objects stay free: users
have classes of their own with the same names.

Two kinds of files name our layers in other ways, which Keras's functions for reading them do not tell from Keras's:

- ``.keras`` files of former versions: the module ``keras.layers``, and the class as the registered name, which Keras's
  own layers lack.
- HDF5 files name classes alone: what loads as Keras's layers loads as ours where :mod:`fusedrnn.keras` is imported,
  apart from the layers inside of wrappers.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import keras
from keras.src import api_export

_MODULE = "keras.src.layers"
_PUBLIC_MODULE = "keras.layers"

_OURS: dict[Any, type] = {}
"""From Keras's classes to ours."""


def register(*classes: type[keras.layers.Layer]) -> None:
    """Register classes by the names of their counterparts in Keras, for saving and for loading."""
    for cls in classes:
        _OURS[getattr(keras.layers, cls.__name__)] = cls
        api_export.register_internal_serializable(f"{_MODULE}.{cls.__name__}", cls)
    _wrap("keras.src.saving.serialization_lib", "_retrieve_class_or_fn", _of_former_versions)
    _wrap("keras.src.legacy.saving.serialization", "class_and_config_for_serialized_keras_object", _of_hdf5)


def _wrap(module: str, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a function of Keras by a wrapper that takes it first. Versions without it load Keras's layers."""
    owner = importlib.import_module(module)
    function = getattr(owner, name, None)
    if function is not None:
        setattr(owner, name, functools.wraps(function)(functools.partial(wrapper, function)))


def _of_former_versions(retrieve: Any, name: str, registered_name: Any, module: Any, *args: Any, **options: Any) -> Any:
    """The class of a saved object."""
    if module == _PUBLIC_MODULE and registered_name == name:
        ours = _OURS.get(getattr(keras.layers, name, None))
        if ours is not None:
            return ours
    return retrieve(name, registered_name, module, *args, **options)


def _of_hdf5(read: Any, *args: Any, **options: Any) -> tuple[Any, Any]:
    """The class and the configuration of an object in an HDF5 file."""
    cls, config = read(*args, **options)
    return _OURS.get(cls, cls), config
