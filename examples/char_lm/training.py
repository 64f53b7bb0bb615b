"""Training, validation and sampling. Losses are cross-entropies in bits per character."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.char_lm.model import CharacterModel, State, detached
from examples.char_lm.results import Run, Step
from examples.char_lm.settings import Settings
from examples.char_lm.text import Corpus, streams, windows

_MAX_GRADIENT_NORM = 1.0


class Diverged(ValueError):
    """The loss is infinite or not a number."""


def batches(corpus: Corpus, settings: Settings) -> Iterator[tuple[bool, Tensor, Tensor]]:
    """An endless series of windows of the training text: whether the text starts again, characters, and the next ones.

    The shorter window at the end of the text is left out, so that all steps have the same size.
    """
    columns = streams(corpus.train, settings.batch)
    while True:
        for index, (x, target) in enumerate(windows(columns, settings.length)):
            if len(x) == settings.length:
                yield index == 0, torch.from_numpy(x), torch.from_numpy(target)


def train(
    model: CharacterModel,
    corpus: Corpus,
    settings: Settings,
    run: Run,
    after_step: Callable[[Run], None] = lambda run: None,
) -> None:
    """Take ``settings.steps`` steps, and append each to ``run.steps``, which has them even after an interrupt.

    Args:
        model: The model, which is trained in place.
        corpus: The corpus, whose training part is used.
        settings: The settings of the training.
        run: It receives losses and times. The time of a step is that from its batch to the updated parameters.
        after_step: A function that is called with the run after each step. Its time is part of the total, not of the
            step.

    Raises:
        Diverged: If a loss is not finite.
    """
    optimizer = torch.optim.Adam(model.parameters(), settings.lr)
    source = batches(corpus, settings)
    state: State = None
    model.train()
    torch.manual_seed(settings.seed)  # dropout must not depend on how many numbers initialization has drawn
    train_start = time.perf_counter()
    for number in range(settings.steps):
        step_start = time.perf_counter()
        restarted, x, target = next(source)
        logits, state = model(x, None if restarted else detached(state))
        loss = _loss(logits, target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
        optimizer.step()
        bits = loss.item() / math.log(2)
        now = time.perf_counter()
        if not math.isfinite(bits):
            raise Diverged(f"{run.name}: the loss is {bits} at step {number + 1}; try a lower --lr than {settings.lr}")
        run.steps.append(Step(bits, now - step_start, now - train_start))
        after_step(run)


def validate(model: CharacterModel, corpus: Corpus, settings: Settings) -> float:
    """The loss on the whole held-out text, read in streams and windows as in training."""
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
    """``settings.sample`` characters from the model, as a continuation of the first window of the training text.

    The same model and settings give the same text. Temperature 0 takes the most likely character every time.
    """
    rng = np.random.default_rng(settings.seed)
    codes: list[int] = []
    x, state = corpus.train[: settings.length, None], None
    model.eval()
    with torch.inference_mode():
        for _ in range(settings.sample):
            logits, state = model(torch.from_numpy(x), state)
            codes.append(_draw(logits[-1, 0].double().numpy(), settings.temperature, rng))
            x = np.array([[codes[-1]]])
    return corpus.decode(np.array(codes, np.int64))


def _draw(logits: np.ndarray[tuple[int], np.dtype[np.float64]], temperature: float, rng: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # division by a temperature near zero gives infinity, as intended
        cumulative = np.exp((logits - logits.max()) / temperature).cumsum()
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), target.flatten())
