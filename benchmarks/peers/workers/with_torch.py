"""PyTorch's own modules, in inference mode, or forward and one call of autograd for all gradients.

For bfloat16, the module and all tensors are bfloat16. For int8, the module is quantized dynamically, which supports
only LSTM and GRU.
"""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.peers.workers.protocol import Workload

_NAMES = {"i2h_weight": "weight_ih", "h2h_weight": "weight_hh", "i2h_bias": "bias_ih", "h2h_bias": "bias_hh"}


def facts() -> dict[str, str]:
    """Versions."""
    return {"torch": torch.__version__}


def prepare(work: Workload) -> tuple[Any, Any]:
    """The call to time, and a function that converts its result to arrays."""
    torch.set_num_threads(work.threads)
    dtype = torch.bfloat16 if work.compute == "bfloat16" else getattr(torch, work.dtype)
    module = _module(work).to(dtype)

    def tensor(array: Any) -> Any:
        return torch.from_numpy(array).to(dtype)

    x = tensor(work.x)
    if work.compute == "int8":
        module = _quantized(work, module)
    if not work.training:
        module.eval()

        def infer() -> Any:
            with torch.inference_mode():
                return module(x)

        return infer, lambda result: work.outputs(_array(result[0]), [_array(state) for state in _tuple(result[1])])

    module.train()
    x.requires_grad_(True)
    states = [tensor(state).requires_grad_(True) for state in work.states]
    hx = states[0] if len(states) == 1 else tuple(states)
    upstream = [tensor(gradient) for gradient in (work.dy, *work.dstates)]
    weights = {name: module.get_parameter(torch_name) for name, torch_name in _names(work).items()}
    update = _small_update(list(weights.values()))

    def train() -> Any:
        update()
        y, final = module(x, hx)
        out = (y, *_tuple(final))
        return out, torch.autograd.grad(out, [x, *states, *weights.values()], upstream)

    def arrays(result: Any) -> dict[str, Any]:
        y, *final = (_array(output.detach()) for output in result[0])
        dx, *rest = (_array(gradient) for gradient in result[1])
        dparams = dict(zip(weights, rest[len(states) :], strict=True))
        return {**work.outputs(y, final), **work.gradients(dx, rest[: len(states)], dparams)}

    return train, arrays


def _array(tensor: Any) -> Any:
    """A tensor as an array, in float32 if it is bfloat16."""
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _quantized(work: Workload, module: Any) -> Any:
    if work.training:
        work.refuse("int8 is a format of inference")
    if work.mode not in ("lstm", "gru"):
        work.refuse("quantizes no recurrent layers but LSTM and GRU")
    network = torch.nn.Sequential(module).eval()  # quantize_dynamic replaces only layers inside a module
    kinds = {torch.nn.LSTM, torch.nn.GRU}
    quantize_dynamic: Any = torch.ao.quantization.quantize_dynamic
    return quantize_dynamic(network, kinds, dtype=torch.qint8)[0]


def _module(work: Workload) -> Any:
    kind: Any = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(work.mode, torch.nn.RNN)
    options = {"nonlinearity": work.mode[4:]} if kind is torch.nn.RNN else {}
    module = kind(
        work.input_size,
        work.hidden_size,
        work.layers,
        bidirectional=work.bidirectional,
        dtype=getattr(torch, work.dtype),
        **options,
    )
    names = _names(work)
    module.load_state_dict({names[name]: torch.from_numpy(weight) for name, weight in work.params.items()})
    return module


def _names(work: Workload) -> dict[str, str]:
    """PyTorch's name of each parameter, by our name."""
    names = {}
    for name in work.params:
        layer, _, kind = name.partition("_")
        names[name] = f"{_NAMES[kind]}_l{layer[1:]}{'_reverse' if layer[0] == 'r' else ''}"
    return names


def _small_update(parameters: list[Any]) -> Any:
    """A function that changes the parameters like an optimizer, so that the module cannot keep packed weights.

    It moves the first element of each up by one unit in the last place, and down again at the next call. This is too
    little to change a result beyond the tolerance.
    """
    firsts = [parameter.detach().view(-1)[:1] for parameter in parameters]  # views share the version counter
    before = [first.clone() for first in firsts]
    after = [torch.nextafter(first, torch.full_like(first, torch.inf)) for first in before]
    values = cycle((after, before))
    return lambda: torch._foreach_copy_(firsts, next(values))


def _tuple(states: Any) -> tuple[Any, ...]:
    return states if isinstance(states, tuple) else (states,)
