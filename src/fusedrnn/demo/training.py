"""Training, validation and sampling. Losses are cross-entropies in bits per character."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
from torch.nn import functional

import torch
from fusedrnn.demo.model import CharacterModel, State, detached
from fusedrnn.demo.results import Run, Step
from fusedrnn.demo.settings import Settings
from fusedrnn.demo.text import Corpus, streams, windows
from torch import Tensor, nn

_LARGEST_GRADIENT = 1.0  # norm to clip to, as is usual with recurrent networks


class Diverged(ValueError):
    """The loss has become infinite or not a number."""


def batches(corpus: Corpus, settings: Settings) -> Iterator[tuple[bool, Tensor, Tensor]]:
    """Windows of the training text without end: whether the text begins anew, characters, and those that follow.

    The shorter window at the end of the text is left out, so that all steps are of one size.
    """
    columns = streams(corpus.train, settings.batch)
    while True:
        for place, (x, target) in enumerate(windows(columns, settings.length)):
            if len(x) == settings.length:
                yield place == 0, torch.from_numpy(x), torch.from_numpy(target)


def train(
    model: CharacterModel,
    corpus: Corpus,
    settings: Settings,
    run: Run,
    after: Callable[[Run], None] = lambda run: None,
) -> None:
    """Take ``settings.steps`` steps and append each to ``run.steps``; what is there stays if one is interrupted.

    Args:
        model: Trained in place.
        corpus: To learn from; its held-out part is not touched.
        settings: Of the training.
        run: Where losses and times go. A step's time is that of all it does, from its batch to the updated parameters.
        after: Called with the run behind each step; its time counts into the total, not into the step's.

    Raises:
        Diverged: If a loss is not finite.
    """
    optimizer = torch.optim.Adam(model.parameters(), settings.lr)
    source = batches(corpus, settings)
    state: State = None
    model.train()
    torch.manual_seed(settings.seed)  # for dropout, whatever the layers took for their parameters
    begin = time.perf_counter()
    for number in range(settings.steps):
        since = time.perf_counter()
        anew, x, target = next(source)
        logits, state = model(x, None if anew else detached(state))
        loss = _loss(logits, target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), _LARGEST_GRADIENT)
        optimizer.step()
        bits = loss.item() / math.log(2)
        now = time.perf_counter()
        if not math.isfinite(bits):
            raise Diverged(f"{run.name}: the loss is {bits} at step {number + 1}; try a lower --lr than {settings.lr}")
        run.steps.append(Step(bits, now - since, now - begin))
        after(run)


def validate(model: CharacterModel, corpus: Corpus, settings: Settings) -> float:
    """The loss on the held-out text, read as in training from its beginning to its end."""
    columns = streams(corpus.held_out, min(settings.batch, len(corpus.held_out) // 2))
    state: State = None
    total, count = 0.0, 0
    model.eval()
    with torch.inference_mode():
        for x, target in windows(columns, settings.length):
            logits, state = model(torch.from_numpy(x), state)
            total += _loss(logits, torch.from_numpy(target)).item() * target.size
            count += target.size
    return total / count / math.log(2)


def sample(model: CharacterModel, corpus: Corpus, settings: Settings) -> str:
    """Text from the model, one character after the other, that goes on where the first window of training ends.

    It has ``settings.sample`` characters. The same model and settings give the same text. Temperature 0 takes the
    likeliest character every time.
    """
    rng = np.random.default_rng(settings.seed)
    written: list[int] = []
    x, state = corpus.train[: settings.length, None], None
    model.eval()
    with torch.inference_mode():
        for _ in range(settings.sample):
            logits, state = model(torch.from_numpy(x), state)
            written.append(_draw(logits[-1, 0].double().numpy(), settings.temperature, rng))
            x = np.array([[written[-1]]])
    return corpus.decode(np.array(written, np.int64))


def _draw(scores: np.ndarray[tuple[int], np.dtype[np.float64]], temperature: float, rng: np.random.Generator) -> int:
    if temperature == 0:
        return int(scores.argmax())
    with np.errstate(over="ignore"):  # hardly any temperature is as good as none
        shares = np.exp((scores - scores.max()) / temperature).cumsum()
    return int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), target.flatten())
