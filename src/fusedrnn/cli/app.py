"""The commands and their options; what they do is elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fusedrnn
from fusedrnn import env
from fusedrnn.bench.contenders import PHASES
from fusedrnn.bench.mxnet_page import NAMES
from fusedrnn.bench.peers.environments import PEERS
from fusedrnn.cli import bench as bench_command
from fusedrnn.cli import demo as demo_command
from fusedrnn.cli import info as info_command
from fusedrnn.cli import planning
from fusedrnn.cli import variants as variants_command
from fusedrnn.cli import warmup as warmup_command
from fusedrnn.cli.console import fail
from fusedrnn.demo.settings import CELLS, Settings
from fusedrnn.engines import registry
from fusedrnn.jit.host import current_target
from fusedrnn.spec import DTYPES
from fusedrnn.testing.cases import CASES

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_MODES, _DTYPES = ",".join(NAMES), ",".join(DTYPES)

Modes = Annotated[str, typer.Option(help=f"Cells, separated by commas: {', '.join(NAMES)}.")]


@app.callback()
def check_environment() -> None:
    """Fused recurrent networks on the CPU: measure them, train with them, look at the machine, compile ahead."""
    try:
        current_target(), env.debug(), env.num_threads()
    except ValueError as error:
        fail(str(error))


@app.command()
def bench(
    cases: Annotated[str, typer.Option(help=f"Workloads, separated by commas: {', '.join(CASES)}.")] = "ds2,ds2-5bi",
    modes: Modes = _MODES,
    phases: Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(PHASES)}.")] = ",".join(PHASES),
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=env.MAX_THREADS, help="Threads for every contender. [default: as fusedrnn finds them]"
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"{' or '.join(DTYPES)}.")] = "float32",
    data: Annotated[
        Path | None,
        typer.Option(help="A .npy array (T, N, I) to run instead of text; the cases' own T, N and I give way to its."),
    ] = None,
    steps: Annotated[str, typer.Option(help="Time steps T instead of the cases' own, separated by commas.")] = "",
    batch: Annotated[str, typer.Option(help="Sequences N instead of the cases' own, separated by commas.")] = "",
    torch: Annotated[
        bool, typer.Option("--torch", help="Compare with torch.nn too, as it is and accelerated by fusedrnn.torch.")
    ] = False,
    only_torch: Annotated[
        bool, typer.Option("--only-torch", help="Compare those two alone: idle BLAS threads disturb them.")
    ] = False,
    packed: Annotated[
        bool,
        typer.Option(
            "--packed",
            help="Those two alone on packed sequences, lengths uniform in T/2 to T, and ours on unpacked ones.",
        ),
    ] = False,
    peers: Annotated[
        str,
        typer.Option(help=f"Compare the operator with other libraries: all, or of {', '.join(PEERS)}, by commas."),
    ] = "",
    against: Annotated[
        str, typer.Option(help="Compare it with other git revisions of itself, separated by commas, such as HEAD~1.")
    ] = "",
    backends: Annotated[
        str,
        typer.Option(help=f"Compare engines of the operator, separated by commas: {', '.join(registry.names())}."),
    ] = "",
    variants: Annotated[
        bool, typer.Option("--variants", help="Compare each cell with its variants, such as a projected LSTM, instead.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0, help="Time to spend on a row, if its calls are short enough.")] = 5.0,
    full: Annotated[
        bool, typer.Option("--full", help="Run all steps cell by cell, however long that takes, not only the first.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write every figure to this file.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw bars for each case and a roofline with every case into this file, such as rows.png."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with tables and pictures to this file.")] = None,
) -> None:
    """Time the fused operator against the same network run cell by cell; without options, as MXNet's two tables.

    Training is the forward pass and all gradients. Outputs and gradients are checked before anything is timed, and
    again as timed; if one is wrong, its row says so and the exit code is 1.

    Work done a second and its share of the peak count only steps that are there: with --packed, not the padding. The
    peak is the best of short samples between the contenders' turns. A share above 100 % is measured again, and not
    shown if it stays.

    With --peers or --against each rival runs in a process of its own, on the same threads, in turns with the operator;
    what it computes is compared with ours before it is timed. `make peers` builds what the libraries need.

    With --variants each cell takes turns with its own variants, each on the work that it has: what is compared is the
    share of the peak. Beside the projected LSTM stands torch.nn's.

    With --backends the operator takes turns with itself on other engines, in this process, on the same threads.

    Contenders take turns, each runs at least twice, and medians are shown; of the network cell by cell also half the
    distance between its fastest and its slowest run, as ±. Where that network would take more than three seconds it is
    measured on its first steps, as many as take one or two seconds, and the table says on how many; the operator always
    runs all of them. With --full both do, but one that takes ten seconds or more runs once only. The two tables take
    less than six minutes on two slow cores.
    """
    try:
        plan = bench_command.make_plan(
            cases,
            modes,
            phases,
            dtype,
            threads,
            data,
            torch,
            seconds,
            full=full,
            only_torch=only_torch,
            packed=packed,
            peers=peers,
            against=against,
            backends=backends,
            steps=steps,
            batch=batch,
        )
        bench_command.check_outputs(json, plot, html)
        if variants:
            if plot or html or len(plan.contenders()) > 2 or plan.backends:
                raise ValueError("--variants goes with --json alone, and compares nothing else")
            right = variants_command.run(plan, json)
            raise typer.Exit(0 if right else 1)
    except (ValueError, ModuleNotFoundError) as error:
        fail(str(error))
    if not bench_command.run(plan, json, plot, html):
        raise typer.Exit(1)


@app.command()
def demo(
    cell: Annotated[str, typer.Option(help=f"{' or '.join(CELLS)}.")] = Settings.cell,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden units of each layer.")] = Settings.hidden,
    layers: Annotated[int, typer.Option(min=1, help="Recurrent layers.")] = Settings.layers,
    steps: Annotated[int, typer.Option(min=1, help="Updates of the parameters.")] = Settings.steps,
    batch: Annotated[int, typer.Option(min=1, help="Streams of text read side by side.")] = Settings.batch,
    length: Annotated[int, typer.Option(min=1, help="Characters of each stream in a step.")] = Settings.length,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = Settings.lr,
    dropout: Annotated[float, typer.Option(help="Between layers; the curves then differ.")] = Settings.dropout,
    seed: Annotated[int, typer.Option(min=0, help="Of initial parameters and of the sample.")] = Settings.seed,
    threads: Annotated[
        int | None, typer.Option(min=1, max=env.MAX_THREADS, help="For both. [default: as fusedrnn finds them]")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Your own text, UTF-8, to learn from instead.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Characters to write in the end.")] = Settings.sample,
    temperature: Annotated[float, typer.Option(help="Of the writing; 0 takes the likeliest.")] = Settings.temperature,
    json: Annotated[Path | None, typer.Option(help="Write every figure to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the loss curves into this file, such as loss.png.")] = None,
) -> None:
    """Train a character language model on English text, first with torch.nn, then with the fused layers.

    Embedding, recurrent layers, linear, softmax and Adam. Both start from the same parameters and see the same text,
    so their loss curves lie on each other. Times are of whole steps, with all that is not recurrent. A token is a
    character. The last twentieth of the text is held out.

    Without options it takes one to two minutes on two cores. Ctrl-C ends it with what was measured by then.
    """
    try:
        settings = Settings(
            cell=cell,
            hidden=hidden,
            layers=layers,
            steps=steps,
            batch=batch,
            length=length,
            lr=lr,
            dropout=dropout,
            seed=seed,
            threads=threads or fusedrnn.get_num_threads(),
            sample=sample,
            temperature=temperature,
        )
        bench_command.check_outputs(json, plot)
        results = demo_command.run(settings, demo_command.prepare(settings, text), json, plot)
    except (ValueError, ModuleNotFoundError) as error:
        fail(str(error))
    if results.interrupted:
        raise typer.Exit(130)


@app.command()
def info(
    plan: Annotated[
        str, typer.Option(help=f"Show how these workloads are shared out: of {', '.join(CASES)}, by commas.")
    ] = "",
    modes: Modes = _MODES,
    dtype: Annotated[str, typer.Option(help=f"{' or '.join(DTYPES)}.")] = "float32",
    threads: Annotated[
        int | None, typer.Option(min=1, max=env.MAX_THREADS, help="For --plan. [default: as fusedrnn finds them]")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="With --plan: time every way to share them out, not just the chosen one.")
    ] = False,
) -> None:
    """Show the processor, what is generated for it, and the peak it reaches on fused multiply-adds.

    With --plan: the ways to share a workload out over threads, the time that the cost model predicts for each, and how
    long the one that it chooses takes. The machine should have nothing else to do.
    """
    if not plan:
        info_command.run()
        return
    try:
        asked = planning.make(plan, modes, dtype, threads, everything)
    except ValueError as error:
        fail(str(error))
    planning.run(asked)


@app.command()
def warmup(
    modes: Modes = _MODES,
    dtypes: Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(DTYPES)}.")] = _DTYPES,
) -> None:
    """Compile ahead, so that no first call has to: kernels depend on the cell and the float type only."""
    try:
        pairs = warmup_command.make_pairs(modes, dtypes)
    except ValueError as error:
        fail(str(error))
    warmup_command.run(pairs)
