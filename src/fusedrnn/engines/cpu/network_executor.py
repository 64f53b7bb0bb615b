"""Runs a network on operands by symbol: one job runs the layers' jobs, one after the other, on the same threads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fusedrnn.arrays import Array
from fusedrnn.engines.cpu.executor import Executor, Weights
from fusedrnn.engines.cpu.jobs import Problem
from fusedrnn.engines.cpu.kernels.lowered_cell import state_letters
from fusedrnn.engines.cpu.launch.chain_args import ChainArgs, ChainedJob
from fusedrnn.engines.cpu.launch.kernel_args import PlannedJob, signed, state_symbols
from fusedrnn.engines.cpu.launch.network_links import NetworkLinks
from fusedrnn.engines.cpu.network_reserve import NetworkReserveLayout, weights_addresses
from fusedrnn.engines.cpu.plan.sizes import Phase
from fusedrnn.engines.cpu.varlen import VarLen
from fusedrnn.engines.interface import SavePolicy
from fusedrnn.frozen_array import is_frozen
from fusedrnn.network_spec import NetworkSpec
from fusedrnn.runtime.buffers import Scratch
from fusedrnn.runtime.job_chain import load_job_chain
from fusedrnn.runtime.thread_pool import get_num_threads, pool_team

NetworkProblem = tuple[Phase, int, int, NetworkReserveLayout | None, tuple[bool, ...]]
"""A phase, T, N, the layout of a training call's reserve, and which layers' weights are packed."""


class PlannedNetwork(PlannedJob[ChainArgs]):
    """The arguments of a network's job on at most so many threads."""

    def __init__(self, spec: NetworkSpec, layers: Sequence[Executor], problem: NetworkProblem, threads: int) -> None:
        self.problem = phase, steps, batch, layout, packed = problem
        layouts = (None,) * len(layers) if layout is None else layout.layers
        self._layers = [
            executor.planned(Problem(phase, steps, batch, own, is_packed), threads)
            for executor, own, is_packed in zip(layers, layouts, packed, strict=True)
        ]
        offsets = () if layout is None else layout.offsets
        self.links = NetworkLinks(spec, steps, batch, phase == "backward", packed, layout is None, offsets)
        super().__init__(phase, load_job_chain(), threads)

    def _plan(self, threads: int, spinning: bool = False) -> ChainArgs:
        layers, links = self._layers, self.links
        # After one layer's job on several threads, the jobs of the other layers find the threads awake.
        spinning = spinning or any(layer.args.num_threads > 1 for layer in layers)
        form = "single_args" if threads == 1 else "spinning_args" if spinning else "args"
        jobs = [
            ChainedJob(index, layer.job, getattr(layer, form), partial(links.link, index))
            for index, layer in enumerate(layers)
        ]
        if links.backward:
            jobs.reverse()
        symbols = links.symbols()
        # Each array's address is the value of a symbol, so there are no more arrays than symbols.
        return ChainArgs(jobs, symbols, len(symbols), links.between_bytes())


class NetworkExecutor:
    """Runs a network's jobs. Any number of threads may call it at once; it checks nothing.

    Its calls use the scratch and the reserves of the first layer's executor.

    Attributes:
        spec: The network.
        layers: The executor of each layer.
    """

    def __init__(self, spec: NetworkSpec, layers: Sequence[Executor]) -> None:
        self.spec, self.layers = spec, layers
        self._planned: dict[str, PlannedNetwork] = {}
        self._layout: tuple[object, NetworkReserveLayout] | None = None
        self._last_split: tuple[Array, tuple[Array, ...]] | None = None

    @property
    def runner(self) -> Executor:
        """The executor that runs the network's jobs."""
        return self.layers[0]

    def compile(self, training: bool = False) -> None:
        """Compile or load the kernels for inference, or for ``training``; else the first call does it."""
        load_job_chain()
        for executor in self.layers:
            executor.compile(training)

    def reserve_layout(self, steps: int, batch: int, save: SavePolicy, resets: bool) -> NetworkReserveLayout:
        """The layout of a training call's reserve; the last one is cached."""
        key, last = (steps, batch, save, resets), self._layout
        if last is None or last[0] != key:
            layout = NetworkReserveLayout.of([executor.tiling for executor in self.layers], *key)
            last = self._layout = key, layout
        return last[1]

    def weights_of(self, params: Array, steps: int, batch: int, save: SavePolicy | None) -> tuple[Weights, ...]:
        """The flat parameter vector as the layers of a call take it; ``save`` is None in inference."""
        parts = self._split(params)
        return tuple([
            executor.weights_of(part, steps, batch, save) for executor, part in zip(self.layers, parts, strict=True)
        ])

    def _split(self, params: Array) -> tuple[Array, ...]:
        """The vector of each layer; of frozen parameters the same objects as before, by which they are recognized."""
        last = self._last_split
        if last is not None and last[0] is params:
            return last[1]
        parts = self.spec.layout.split(params)
        if is_frozen(params):
            self._last_split = params, parts
        return parts

    def current_weights(
        self, params: Array, size: tuple[int, int], packed: Sequence[bool], training: bool
    ) -> tuple[Weights | None, ...]:
        """As :meth:`weights_of`, for a call of (T, N) when it is known which layers have packed weights.

        In inference, the result is None for a layer that reads its parameters where they are.
        """
        team, weights = pool_team(get_num_threads()), list[Weights | None]()
        for executor, part, is_packed in zip(self.layers, self.spec.layout.parts, packed, strict=True):
            cache = executor.weight_cache_for(*size)
            if is_packed:
                weights.append(cache.packed_vector(params[part], training, team))
            else:
                weights.append(cache.copied_vector(params[part]) if training else None)
        return tuple(weights)

    def planned(self, problem: NetworkProblem, threads: int) -> PlannedNetwork:
        """The planned call for a problem on so many threads; the last one of each phase is cached."""
        last = self._planned.get(problem[0])
        if last is None or last.threads != threads or last.problem != problem:
            last = self._planned[problem[0]] = PlannedNetwork(self.spec, self.layers, problem, threads)
        return last

    def run(
        self, problem: NetworkProblem, values: dict[str, int], weights: Sequence[Weights | None], varlen: VarLen | None
    ) -> None:
        """Run a job on operands by symbol; symbols without a value are 0."""
        team = pool_team(get_num_threads())
        values |= {"spins": team.spins} | by_layer("weights", weights_addresses(weights))

        def bind(args: ChainArgs, scratch: Scratch) -> int:
            known = values | {"dx_partials": scratch.address + args.workspace_offset if values.get("dx") else 0}
            if varlen is not None:
                for job in args.jobs:
                    known[f"tables {job.layer}"] = varlen.tables(job.args.plan.row_starts).ctypes.data
            return args.bind(scratch, known)

        self.runner.run_planned(self.planned(problem, team.threads), team, bind)

    def fits(self, params: Array) -> bool:
        """Whether an array is a parameter vector that needs no conversion."""
        flags, layout = params.flags, self.spec.layout
        is_vector = params.dtype == layout.dtype and params.shape == (layout.size,)
        return is_vector and flags.c_contiguous and flags.aligned

    def state_symbols(self, index: int, form: str) -> list[str]:
        """The symbols of a layer's states, such as ``1 h0`` for the form ``{}0``."""
        letters = state_letters(len(self.spec.layers[index].state_names))
        symbols = state_symbols(letters[: len(self.spec.layers[index].state_names)], form)
        return [NetworkLinks.of_layer(index, symbol) for symbol in symbols]


def by_layer(name: str, values: Sequence[int]) -> dict[str, int]:
    """The values of a symbol of each layer."""
    return {f"{name} {index}": signed(value) for index, value in enumerate(values)}
