"""Fewer cases of a cross product: every pair of parameter values stays, but not every combination.

A test or class marked ``pairwise`` keeps all its cases on the native target. Of its cases on other targets it keeps
enough that every two values of different parameters meet in one case. Tests on the native target find a defect that
shows only where three values meet: all targets' kernels come from the same emitters. Where the native target has
instructions for formats that its base lacks, as with AMX, float32 and float64 are tested on the base, and therefore
also in pairs.

A test marked ``each_value`` keeps enough cases that each value of each parameter is in one of them. It is a test of an
adapter, whose code for the kinds of layers is independent of its code for the options of a call.

A test or file marked ``one_value("kind")`` keeps one value of that parameter for each combination of the others. The
code under test does not depend on the parameter, as an adapter's code does not depend on the kind of layer. The value
is drawn by the test's name: it is always the same, and the tests of a file together meet all values. If a test is
marked ``each_value`` as well, only ``each_value`` counts.
"""

import os
import zlib
from collections import defaultdict
from hashlib import sha256
from itertools import combinations

from fusedrnn.jit.host import available_targets
from fusedrnn.jit.target import known_targets
from fusedrnn.spec import DTYPES, MODES

NATIVE = available_targets()[0].name


def target_names(compute=None):
    """Every target of this processor's family; those that the processor lacks are emulated.

    With ``compute``, also the targets whose first dot product is for that format, and those with tiles for it.
    """
    native = {target.name for target in available_targets()}

    def is_tested(target):
        is_first = target.dot_products[:1] == (compute,)
        return not target.base or is_first or target.multiplies_tiles(compute)

    targets = [target for target in known_targets() if is_tested(target)]
    return [target.name if target.name in native else f"{target.name}-emulated" for target in targets]


def reduce(items):
    """Split collected tests into those to run and those that add no pair of values."""
    kept, groups, singles, draws = [], defaultdict(list), defaultdict(list), defaultdict(list)
    places = defaultdict(dict)  # the number of each parameter's values, in the order in which they come
    for item in items:
        if hasattr(item, "callspec") and item.get_closest_marker("each_value") is not None:
            singles[item.nodeid.partition("[")[0]].append(item)
            continue
        drawn = _drawn_parameters(item)
        if drawn:
            draws[_name_without(item, drawn, places)].append(item)
            continue
        target = item.callspec.params.get("target", NATIVE) if hasattr(item, "callspec") else NATIVE
        if target == NATIVE or item.get_closest_marker("pairwise") is None:
            kept.append(item)
        else:
            groups[item.nodeid.partition("[")[0]].append(item)
    for group in groups.values():
        kept += covering([item for item in group if _is_compiled(item.callspec.params)])
    for group in singles.values():
        kept += covering(group, 1)
    kept += [group[sha256(name.encode()).digest()[0] % len(group)] for name, group in draws.items()]
    chosen = set(kept)
    return [item for item in items if item in chosen], [item for item in items if item not in chosen]


def dtypes(mode, dtypes=DTYPES):
    """The number formats to test a cell in on the target in force: all on the native one, one in turn on others."""
    target = os.environ.get("FUSEDRNN_TARGET", NATIVE)
    return [dtype for dtype in dtypes if _is_compiled({"target": target, "mode": mode, "dtype": dtype})]


def _is_compiled(params):
    """Whether a cell is tested on a target in a format. On targets other than the native one, each cell has one format.

    Of the formats of operands, about one in three is tested there, always the same ones.
    """
    if params["target"] == NATIVE:
        return True
    cell = params.get("variant", params.get("mode"))
    if "compute" in params and cell:
        return zlib.crc32(f"{cell} {params['compute']} {params['target']}".encode()) % 3 == 0
    if not {"mode", "dtype"} <= params.keys():
        return True
    place = target_names().index(params["target"]) + MODES.index(params["mode"])
    return DTYPES.index(params["dtype"]) == place % len(DTYPES)


def _drawn_parameters(item):
    """The parameters of an item of which one value is drawn."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return {name for marker in item.iter_markers("one_value") for name in marker.args if name in params}


def _name_without(item, drawn, places):
    """The test's name, and the values of its other parameters by number, since not every value has a name."""
    words = [item.nodeid.partition("[")[0]]
    for name, value in sorted(item.callspec.params.items(), key=lambda parameter: parameter[0]):
        if name not in drawn:
            seen = places[words[0], name]
            words.append(f"{name}={seen.setdefault(id(value), len(seen))}")
    return " ".join(words)


def covering(items, count=2):
    """Some of the items that together have every pair of parameter values of all; with ``count`` 1 every value."""
    pairs = {item: set(combinations(_values(item), count)) for item in items}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        best = max(items, key=lambda item: len(pairs[item] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen or items[:1]


def _values(item):
    """The item's parameters: names and values, as text."""
    return sorted((name, repr(value)) for name, value in item.callspec.params.items())
