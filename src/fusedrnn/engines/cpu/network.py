"""A network as one job: the jobs of its layers, one after the other on the same threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from fusedrnn.engines.cpu.cached_network import CachedNetworkBackward, CachedNetworkForward
from fusedrnn.engines.cpu.executor import Executor, PlannedJob, Weights
from fusedrnn.engines.cpu.guarded_call import CannotGuard
from fusedrnn.engines.cpu.jobs import JobName
from fusedrnn.engines.cpu.kernels.stages import state_letters
from fusedrnn.engines.cpu.launch.chain_args import ChainArgs, ChainedJob
from fusedrnn.engines.cpu.launch.kernel_args import signed, state_symbols
from fusedrnn.engines.cpu.launch.network_links import NetworkLinks
from fusedrnn.engines.cpu.network_reserve import (
    NetworkReserveLayout,
    NetworkResiduals,
    are_packed,
    weights_addresses,
)
from fusedrnn.engines.cpu.varlen import VarLen
from fusedrnn.engines.interface import SavePolicy
from fusedrnn.engines.network import LayerStates, NetworkGradOperands, NetworkOperands
from fusedrnn.network_spec import NetworkSpec
from fusedrnn.runtime.buffers import Scratch
from fusedrnn.runtime.job_chain import load_job_chain
from fusedrnn.runtime.thread_pool import get_num_threads, pool_team
from fusedrnn.spec import Array

R = TypeVar("R")
NetworkProblem = tuple[JobName, int, int, NetworkReserveLayout | None, tuple[bool, ...]]
"""A job, T, N, the layout of a training call's reserve, and which layers' weights are packed."""


class PlannedNetwork(PlannedJob[ChainArgs]):
    """The arguments of a network's job on at most so many threads."""

    def __init__(self, spec: NetworkSpec, layers: Sequence[Executor], problem: NetworkProblem, threads: int) -> None:
        self.problem = name, steps, batch, layout, packed = problem
        layouts = (None,) * len(layers) if layout is None else layout.layers
        self._layers = [
            executor.planned((name, steps, batch, own), threads)
            for executor, own in zip(layers, layouts, strict=True)
        ]
        offsets = () if layout is None else layout.offsets
        self.links = NetworkLinks(spec, steps, batch, name == "backward", packed, layout is None, offsets)
        super().__init__(name, load_job_chain(), threads)

    def _plan(self, threads: int, spinning: bool = False) -> ChainArgs:
        layers, links = self._layers, self.links
        # Once the threads run one layer's job, the others find them awake.
        spinning = spinning or any(layer.args.num_threads > 1 for layer in layers)
        form = "single_args" if threads == 1 else "spinning_args" if spinning else "args"
        jobs = [
            ChainedJob(layer.job, getattr(layer, form), partial(links.link, index))
            for index, layer in enumerate(layers)
        ]
        if links.backward:
            jobs.reverse()
        symbols = links.symbols()
        # Each array is the value of a symbol.
        return ChainArgs(jobs, symbols, len(symbols), links.between_bytes())


class CPUNetwork:
    """Runs a network; see :class:`fusedrnn.engines.network.NetworkEngine`.

    Its calls use the workspaces and reserves of its first layer's executor.

    Attributes:
        spec: The network.
        layers: The executor of each layer.
    """

    def __init__(self, spec: NetworkSpec, layers: Sequence[Executor]) -> None:
        self.spec, self.layers = spec, layers
        self._planned: dict[str, PlannedNetwork] = {}
        self._layout: tuple[object, NetworkReserveLayout] | None = None

    @property
    def runner(self) -> Executor:
        """The executor that runs the network's jobs."""
        return self.layers[0]

    def compile(self, training: bool = False) -> None:
        """Compile or load the kernels for inference, or for ``training``; else the first call does it."""
        load_job_chain()
        for executor in self.layers:
            executor.compile(training)

    def reserve_bytes(self, steps: int, batch: int, save: SavePolicy) -> int:
        """Bytes of the reserve of a training call with T steps of N sequences."""
        return self.describe_reserve(steps, batch, save, False).size

    def describe_reserve(self, steps: int, batch: int, save: SavePolicy, resets: bool) -> NetworkReserveLayout:
        """The layout of a training call's reserve; the last one is cached."""
        key, last = (steps, batch, save, resets), self._layout
        if last is None or last[0] != key:
            layout = NetworkReserveLayout.of([executor.tiling for executor in self.layers], *key)
            last = self._layout = key, layout
        return last[1]

    def weights_of(self, params: Array, steps: int, batch: int, save: SavePolicy | None) -> tuple[Weights, ...]:
        """The flat parameter vector as the layers of a call take it; ``save`` is None in inference."""
        parts = self.spec.layout.parts
        return tuple([
            executor.weights_of(params[part], steps, batch, save)
            for executor, part in zip(self.layers, parts, strict=True)
        ])  # fmt: skip

    def planned(self, problem: NetworkProblem, threads: int) -> PlannedNetwork:
        """The planned call for a problem on so many threads; the last one of each job is cached."""
        last = self._planned.get(problem[0])
        if last is None or last.threads != threads or last.problem != problem:
            last = self._planned[problem[0]] = PlannedNetwork(self.spec, self.layers, problem, threads)
        return last

    def forward(self, operands: NetworkOperands) -> LayerStates:
        """Inference."""
        steps, batch = operands.x.shape[:2]
        weights = self.weights_of(operands.params, steps, batch, None)
        return self._run_forward(operands, "forward", weights, _varlen(operands), None, {})

    def train(
        self, operands: NetworkOperands, save: SavePolicy, seeds: Sequence[int]
    ) -> tuple[LayerStates, NetworkResiduals]:
        """Training."""
        steps, batch = operands.x.shape[:2]
        varlen, weights = _varlen(operands), self.weights_of(operands.params, steps, batch, save)
        layout = self.describe_reserve(steps, batch, save, operands.resets is not None)
        lease = self.runner.lease_reserve(layout.size)
        values = {"reserve": lease.address}
        final = self._run_forward(operands, "training", weights, varlen, layout, values | _by_layer("seed", seeds))
        return final, NetworkResiduals(layout, tuple(seeds), varlen, operands.resets, lease, weights)

    def _run_forward(
        self, operands: NetworkOperands, name: JobName, weights: tuple[Weights, ...], varlen: VarLen | None,
        layout: NetworkReserveLayout | None, values: dict[str, int],
    ) -> LayerStates:  # fmt: skip
        x, y = operands.x, operands.y
        steps, batch = x.shape[:2]
        final = tuple(
            tuple([np.empty(shape, x.dtype) for shape in shapes]) for shapes in self.spec.state_shape(batch)
        )
        values |= {"params": _address(operands.params), "resets": _address(operands.resets)}
        values |= _strided("x", x) | _strided("y", y)
        values |= self._states("{}0", operands.states) | self._states("{}_n", final)
        values |= self._states("{}_reset", operands.reset_states)
        values |= self._all_states("all_{}", operands.all_states)
        self._run((name, steps, batch, layout, are_packed(weights)), values, weights, varlen)
        return final

    def backward(self, residuals: NetworkResiduals, operands: NetworkGradOperands) -> None:
        """The gradients."""
        grads, layout = operands.grads, residuals.layout
        for buffers in grads.reset_states or ():
            for buffer in buffers:
                if not grads.add_reset_states:
                    buffer.fill(0)  # kernels add
        values = {
            "reserve": residuals.lease.address, "resets": _address(residuals.resets),
            "dparams": _address(grads.params),
            **{name: int(getattr(grads, name)) for name in ("add_x", "add_params", "add_states")},
            **_by_layer("seed", residuals.seeds),
            **_strided("dy", operands.dy), **_strided("dx", grads.x),
            **self._states("d{}_n", operands.dstates), **self._states("d{}0", grads.states or ()),
            **self._states("d{}_reset", grads.reset_states or ()),
            **self._all_states("dall_{}", operands.dall_states),
        }  # fmt: skip
        steps, batch = layout.layers[0].steps, layout.layers[0].batch
        problem: NetworkProblem = "backward", steps, batch, layout, are_packed(residuals.weights)
        self._run(problem, values, residuals.weights, residuals.varlen)

    def _run(
        self, problem: NetworkProblem, values: dict[str, int], weights: tuple[Weights, ...], varlen: VarLen | None
    ) -> None:
        team = pool_team(get_num_threads())
        values |= {"spins": team.spins} | _by_layer("weights", weights_addresses(weights))

        def bind(args: ChainArgs, scratch: Scratch) -> int:
            tables = [
                0 if varlen is None else varlen.tables(job.args.plan.row_starts).ctypes.data for job in args.jobs
            ]
            workspace = scratch.address + args.plan_offset if values.get("dx") else 0
            return args.bind(scratch, {**values, **_by_layer("tables", tables), "dx_partials": workspace})

        self.runner.run_planned(self.planned(problem, team.threads), team, bind)

    def cache_forward(
        self, operands: NetworkOperands, states: Any, residuals: NetworkResiduals | None
    ) -> CachedNetworkForward | None:
        """The cached form of a forward call that has just run; None if there is none."""
        return self._cache(CachedNetworkForward, operands, states, residuals)

    def cache_backward(
        self, residuals: NetworkResiduals, operands: NetworkGradOperands, grad_req: Any
    ) -> CachedNetworkBackward | None:
        """The cached form of a backward call that has just run; None if there is none."""
        return self._cache(CachedNetworkBackward, residuals, operands, grad_req)

    def _cache(self, cached_call: Callable[..., R], *arguments: Any) -> R | None:
        if self.runner.debug >= 2:
            return None
        try:
            return cached_call(self, *arguments)
        except CannotGuard:
            return None

    def fits(self, params: Array) -> bool:
        """Whether an array is a parameter vector that needs no conversion."""
        flags, layout = params.flags, self.spec.layout
        is_vector = params.dtype == layout.dtype and params.shape == (layout.size,)
        return is_vector and flags.c_contiguous and flags.aligned

    def _states(self, form: str, states: Sequence[Sequence[Array | None] | None]) -> dict[str, int]:
        """The values of the symbols of states or of their gradients."""
        return {
            symbol: _address(array)
            for index, arrays in enumerate(states)
            for symbol, array in zip(self.state_symbols(index, form), arrays or (), strict=False)
        }

    def state_symbols(self, index: int, form: str) -> list[str]:
        """The symbols of a layer's states, such as ``1 h0`` for the form ``{}0``."""
        letters = state_letters(len(self.spec.layers[index].state_names))
        symbols = state_symbols(letters[: len(self.spec.layers[index].state_names)], form)
        return [NetworkLinks.of_layer(index, symbol) for symbol in symbols]

    def _all_states(self, form: str, arrays: Sequence[Array | None]) -> dict[str, int]:
        letters = state_letters(len(self.spec.layers[-1].state_names))[1:]
        return {form.format(letter): _address(array) for letter, array in zip(letters, arrays, strict=False)}


def _by_layer(name: str, values: Sequence[int]) -> dict[str, int]:
    return {f"{name} {index}": signed(value) for index, value in enumerate(values)}


def _address(array: Array | None) -> int:
    return 0 if array is None else array.ctypes.data


def _strided(name: str, array: Array | None) -> dict[str, int]:
    """The address and the strides of an array (T, N, features), by symbol."""
    if array is None:
        return {}
    return {name: array.ctypes.data, f"{name}_step": array.strides[0], f"{name}_row": array.strides[1]}


def _varlen(operands: NetworkOperands) -> VarLen | None:
    return None if operands.lengths is None else VarLen.padded(operands.lengths, len(operands.x))
