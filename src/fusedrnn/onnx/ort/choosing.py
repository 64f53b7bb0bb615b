"""Chooses which recurrent nodes of a model to replace, and gives the reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fusedrnn.onnx.graph import first_line
from fusedrnn.onnx.ort import interrupts, shared_object
from fusedrnn.onnx.ort.calibration import NodeTimes, Times, compare, measure_nodes, pays
from fusedrnn.onnx.ort.feeds import Feeds, example_feeds
from fusedrnn.onnx.ort.report import NodeReport, Report
from fusedrnn.onnx.ort.rewriting import RecurrentNode
from fusedrnn.onnx.ort.sessions import Sessions

# ONNX Runtime's log level above that of errors.
_SILENT = 4
_UNSUPPORTED = "custom operators need Linux on x86-64 or aarch64"


def choose(
    onnxruntime: Any,
    sessions: Sessions,
    plain: Any,
    policy: str,
    feeds: Sequence[Feeds] | None,
    threads: int,
    seconds: float,
) -> tuple[Any, Report]:
    """The session to use, and its report.

    Args:
        onnxruntime: The module ``onnxruntime``.
        sessions: Makes sessions of the model.
        plain: A session in which nothing is replaced.
        policy: ``"auto"`` or ``"always"``.
        feeds: Inputs to measure with; None for examples.
        threads: The most threads of a call.
        seconds: How long to measure, approximately.

    Raises:
        NotImplementedError: If all nodes are to be replaced, and this system cannot load custom operators.
    """
    left: Mapping[int, str] = {}
    if not sessions.replaceable:
        return plain, _report(sessions, left, {}, "no recurrent node can be replaced", threads)
    if not shared_object.is_supported():
        if policy == "always":
            raise NotImplementedError(f"replace='always' is not possible here: {_UNSUPPORTED}")
        return plain, _report(sessions, left, {}, _UNSUPPORTED, threads)
    if policy == "always":
        chosen = dict.fromkeys(sessions.replaceable, "as asked")
        return sessions.replaced(sessions.replaceable), _report(sessions, chosen, {}, "as asked, unmeasured", threads)
    try:
        samples = _runnable_examples(onnxruntime, sessions, plain) if feeds is None else feeds
    except ValueError as error:
        return plain, _report(sessions, left, {}, f"not measured, {error}", threads)
    interrupts.keep(None)
    try:
        times = measure_nodes(sessions, samples, sorted({1, threads}), seconds / 2)
        return _choose_measured(sessions, plain, samples, times, threads, seconds / 2)
    except Exception as error:  # of many types; a model that runs unchanged must not fail because of replaced nodes
        interrupts.raise_interrupt(error)
        reason = f"not possible, {type(error).__name__}: {first_line(error)}"
        return plain, _report(sessions, left, {}, reason, threads)


def _choose_measured(
    sessions: Sessions, plain: Any, feeds: Sequence[Feeds], times: Mapping[int, NodeTimes], threads: int, seconds: float
) -> tuple[Any, Report]:
    chosen = _faster_nodes(sessions, times)
    if not chosen:
        (before,) = compare([plain], feeds, seconds / 2)
        return plain, _report(sessions, {}, times, "ONNX Runtime alone is faster", threads, (before, before))
    session = sessions.replaced(sorted(chosen))
    best = {number: time_of.threads for number, time_of in chosen.items()}
    # ONNX Runtime's threads spin for a while, so several threads in a replaced node may slow down the nodes after it.
    settings = [best] if max(best.values()) == 1 else [best, dict.fromkeys(chosen, 1)]
    results = []
    for setting in settings:
        sessions.set_num_threads(setting)
        results.append(compare([plain, session], feeds, seconds / len(settings)))
    before, after = best_result = min(results, key=lambda result: result[1].relative)
    if not pays(before, after, sum(times[number].saved for number in chosen if number in times)):
        return plain, _report(sessions, {}, times, "ONNX Runtime alone is as fast", threads, (before, after))
    sessions.set_num_threads(settings[results.index(best_result)])
    reasons = {number: time_of.reason for number, time_of in chosen.items()}
    reason = f"{1 / after.relative:.2f} times as fast as ONNX Runtime alone"
    return session, _report(sessions, reasons, times, reason, threads, (before, after))


def _runnable_examples(onnxruntime: Any, sessions: Sessions, plain: Any) -> list[Feeds]:
    """Example feeds that the model runs on; a ValueError if there are none."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = _SILENT
    layers = [sessions.nodes[number].layer for number in sessions.replaceable]
    num_features = dict.fromkeys(layer.parts[0].spec.input_size for layer in layers if layer is not None)
    reason = ""
    for feeds in example_feeds(plain.get_inputs(), [*num_features]):
        try:
            plain.run(None, feeds, options)
        except Exception as error:  # of many types
            reason = first_line(error)
        else:
            return [feeds]
    raise ValueError(f"since the model does not run on examples of its inputs: pass feeds ({reason})")


class _Choice(NamedTuple):
    """A node to replace: its number of threads, and the reason."""

    threads: int
    reason: str


def _faster_nodes(sessions: Sessions, times: Mapping[int, NodeTimes]) -> dict[int, _Choice]:
    """The nodes that are faster when replaced."""
    chosen = {number: _Choice(time.threads, "faster") for number, time in times.items() if time.pays}
    alike = {_kind(sessions.nodes[number]): number for number in chosen}
    for number in sessions.replaceable:
        if number not in times and (other := alike.get(_kind(sessions.nodes[number]))) is not None:
            # For example in a branch of an If that the feeds do not enter.
            reason = f"not run by the feeds, but like {sessions.nodes[other].name!r}"
            chosen[number] = _Choice(chosen[other].threads, reason)
    return chosen


def _kind(node: RecurrentNode) -> object:
    assert node.layer is not None
    return tuple(part.spec for part in node.layer.parts)


def _report(
    sessions: Sessions, replaced: Mapping[int, str], times: Mapping[int, NodeTimes], reason: str, threads: int,
    whole: tuple[Times, Times] | None = None,
) -> Report:  # fmt: skip
    nodes = [
        _node_report(node, replaced.get(number), times.get(number), measured=bool(times))
        for number, node in enumerate(sessions.nodes)
    ]
    if whole is None:
        return Report(tuple(nodes), reason, threads)
    before, after = whole
    share = min(1.0, sum(time.onnxruntime for time in times.values()) / before.fastest)
    return Report(tuple(nodes), reason, threads, share, (before.median, after.median))


def _node_report(node: RecurrentNode, replaced: str | None, time: NodeTimes | None, measured: bool) -> NodeReport:
    sizes = None
    if node.layer is not None:
        spec = node.layer.parts[0].spec
        sizes = spec.input_size, spec.hidden_size, sum(part.spec.num_directions for part in node.layer.parts)
    reason = replaced or node.reason
    if reason is None:
        if not measured:
            reason = "not measured"
        elif time is None:
            reason = "not run by the feeds"
        else:
            reason = "faster alone, but the model is not" if time.pays else "slower when replaced"
    seconds = None if time is None or time.fused is None else (time.onnxruntime, time.fused)
    return NodeReport(node.name, node.operator, node.in_body, sizes, replaced is not None, reason, seconds)
