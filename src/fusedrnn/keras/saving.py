"""The names of our layers in saved models. They are Keras's, so that files load where fusedrnn is not imported.

A saved layer names a module, a class and a registered name. Keras looks for the registered name first, then for the
class in the module. Our layers write Keras's module and class, and the name of that class as the registered name;
Keras's own layers write no registered name. So a file with our layers loads as our layers in a process that has
imported :mod:`fusedrnn.keras`, and as Keras's layers in any other process. A ``.keras`` file with Keras's layers loads
as Keras's layers everywhere. HDF5 files and configurations without a module name classes alone: there Keras's layers
load as ours where :mod:`fusedrnn.keras` is imported, apart from those inside of wrappers.
"""

from __future__ import annotations

from typing import Any

import keras


def register(*classes: type[keras.layers.Layer]) -> None:
    """Register classes by the names of their counterparts in ``keras.layers``, for saving and for loading."""
    for cls in classes:
        cls.__module__ = "keras.layers"
        keras.saving.get_custom_objects()[cls.__name__] = cls


class Pickled:
    """A mixin that comes before a class of Keras, which pickles the content of a ``.keras`` file.

    Keras's own function for reading it is a method of the layer's class, which Keras's module does not know.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        of_keras: Any = super().__reduce__()
        return unpickled, of_keras[1]


def unpickled(file: Any) -> Any:
    """The layer in the content of a file."""
    return keras.layers.Layer._unpickle_model(file)
