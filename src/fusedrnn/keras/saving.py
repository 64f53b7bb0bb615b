"""How our layers are named in saved models: as Keras's own, which they become where fusedrnn is not imported.

A saved layer names a module, a class and a registered name. Keras looks for the registered name first, then for the
class in the module. Ours write Keras's module and class, and that class's name as the registered one, which Keras's own
layers do not write. So a file with our layers gives ours in a process that has imported :mod:`fusedrnn.keras`, and
Keras's in any other; a file with Keras's layers gives Keras's everywhere.
"""

from __future__ import annotations

import keras


def register(*classes: type[keras.layers.Layer]) -> None:
    """Let Keras find these classes, whose names are those of classes in ``keras.layers``, and save them as such."""
    for cls in classes:
        cls.__module__ = "keras.layers"
        keras.saving.get_custom_objects()[cls.__name__] = cls
