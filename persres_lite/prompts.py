"""Where words stand in a prompt, and which prompt stands behind each row of a U-Net call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

END_OF_WORD = "</w>"

ROUNDING = 0.05
"""By how much a token's embedding may differ from itself, relative to its length, when it is computed again in another
batch or in half precision. Between two words it differs by several tenths.
"""


def token_positions(tokenizer: Any, prompt: str, words: str | Sequence[str]) -> list[int]:
    """Positions of words in a tokenized prompt, counted as the U-Net sees them: the start token is position 0.

    A word that the tokenizer splits is found with all its pieces, and only as a whole word. Every occurrence counts.

    Parameters
    ----------
    tokenizer : CLIPTokenizer
        The pipeline's.
    prompt : str
        The whole prompt.
    words : str or list of str
        Each one a word or a phrase. A phrase ("sks cat") is looked for as it stands, so that another cat in the prompt
        is left out; if it nowhere stands together ("a sks, the cat"), its words are looked for one by one.

    Returns
    -------
    list of int
        Sorted, without repetition.

    Raises
    ------
    ValueError
        If a word is not in the prompt, or only beyond the tokenizer's length limit.
    """
    ids = tokenizer(prompt, verbose=False).input_ids  # not cut off: too long is told apart from missing
    limit = tokenizer.model_max_length
    starts = _word_starts(tokenizer, ids)
    wanted = [words] if isinstance(words, str) else list(words)
    if not any(phrase.split() for phrase in wanted):
        raise ValueError("No words were given: name the words whose attention is asked for.")
    positions: set[int] = set()
    missing: list[str] = []
    for phrase in wanted:
        found = _occurrences(tokenizer, ids, starts, phrase)
        for word in phrase.split() if not found else ():
            at = _occurrences(tokenizer, ids, starts, word)
            found += at
            missing += [] if at else [word]
        positions.update(found)
    if missing:
        raise ValueError(
            f'The prompt "{prompt}" does not contain {", ".join(map(repr, missing))}: it needs the words '
            f'"{" ".join(wanted)}", written as they were for training.'
        )
    if max(positions) >= limit - 1:  # the last place is the end token's
        raise ValueError(
            f'The prompt "{prompt}" has {len(ids)} tokens and is cut off at {limit}, before the end of '
            f'"{" ".join(wanted)}": move these words to the front or shorten it.'
        )
    return sorted(positions)


def _word_starts(tokenizer: Any, ids: list[int]) -> list[bool]:
    """For each token whether a new word starts there; one more entry for the end."""
    whole = set(tokenizer.get_added_vocab()) | set(tokenizer.all_special_tokens)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    return [True] + [piece in whole or piece.endswith(END_OF_WORD) for piece in pieces]


def _occurrences(tokenizer: Any, ids: list[int], starts: list[bool], words: str) -> list[int]:
    """Positions of all pieces of `words`, wherever they stand one after the other and at the bounds of words."""
    sought = tokenizer(words, add_special_tokens=False).input_ids
    found: list[int] = []
    for i in range(1, len(ids) - len(sought)):
        if ids[i : i + len(sought)] == sought and starts[i] and starts[i + len(sought)]:
            found += range(i, i + len(sought))
    return found


def find_words(base: Any, prompts: Sequence[str], words: str | Sequence[str]) -> list[list[int]]:
    """`token_positions` of the same words in each prompt, with the pipeline's own tokenizer.

    Embeddings of several vectors (textual inversion) are spelled out first, as the pipeline does. XL's two tokenizers
    count alike; the first is asked.
    """
    tokenizer = getattr(base, "tokenizer", None) or getattr(base, "tokenizer_2", None)
    if tokenizer is None:
        raise TypeError(f"{type(base).__name__} has no tokenizer to find words with: pass the whole pipeline.")
    convert = getattr(base, "maybe_convert_prompt", lambda text, _: text)
    phrases = [convert(phrase, tokenizer) for phrase in ([words] if isinstance(words, str) else words)]
    return [token_positions(tokenizer, convert(prompt, tokenizer), phrases) for prompt in prompts]


def words_of(prompt: str) -> list[str]:
    """The words of a prompt, without punctuation and repetition, in order."""
    stripped = (word.strip(".,;:!?\"'()[]") for word in prompt.split())
    return list(dict.fromkeys(word for word in stripped if word))


@dataclass(frozen=True)
class Halves:
    """The rows of one U-Net call: those of the prompts, and under guidance those of the negative prompts.

    Attributes
    ----------
    conditional, unconditional : slice or None
        One row an image each, in the order of the images. None if this call has no such rows.
    """

    conditional: slice | None
    unconditional: slice | None


class Call:
    """One pipeline call: what it works on, and which of its U-Net calls is at work.

    Parameters
    ----------
    prompts : list of str
        One for each image, in the order of the batch. Empty if they are unknown and not needed.
    embeddings : callable
        Gives what the prompts were encoded to, (images, tokens, width), and the negative prompts likewise, or None.

    Attributes
    ----------
    step : int
        Number of the U-Net call, counted from 0; -1 before the first.
    halves : Halves
        Its rows.
    """

    def __init__(self, prompts: list[str], embeddings: Callable[[], tuple[Any, Any]]) -> None:
        self.prompts, self.embeddings = prompts, embeddings
        self.step = -1
        self.halves = Halves(None, None)
        self._text: Any = None  # of the latest U-Net call

    def next(self, text: torch.Tensor) -> None:
        """A U-Net call begins: count it, and find out which rows belong to the prompts.

        They are known by their text: it is compared with what the prompts were encoded to. So it does not matter in
        which order the halves stand, whether a callback ends guidance in mid-run (`SDCFGCutoffCallback`), or whether
        somebody calls the U-Net for each half by itself.

        Parameters
        ----------
        text : tensor (rows, tokens, width)
            The U-Net's `encoder_hidden_states`.

        Raises
        ------
        ValueError
            If the rows are neither one nor two an image (perturbed-attention guidance, InstructPix2Pix), or if the
            text is that of other prompts.
        """
        self.step += 1
        if text is not self._text:  # a pipeline passes the same tensor at every step: one comparison a run
            self.halves, self._text = self._find(text), text

    def _find(self, text: torch.Tensor) -> Halves:
        rows, images = len(text), len(self.prompts)
        if not images:
            return Halves(slice(0, rows), None)  # masks are drawn by hand and nobody asks for words: all rows alike
        if rows not in (images, 2 * images):
            raise ValueError(
                f"The U-Net was called with {rows} rows for {images} images: expected one row an image, or two with "
                "guidance."
            )
        positive, negative = self.embeddings()
        groups = [slice(start, start + images) for start in range(0, rows, images)]
        ours = [group for group in groups if _same_text(text[group], positive)]
        if ours:  # both groups, if the negative prompt is the prompt itself
            others = [group for group in groups if group != ours[-1]]
            return Halves(ours[-1], others[0] if others else None)
        if len(groups) == 1 and _same_text(text, negative):
            return Halves(None, groups[0])
        raise ValueError(
            f"The U-Net was called with the text of other prompts than {self.prompts!r}, which the pipeline encoded "
            "last: call the pipeline itself, or open the context with the prompts whose embeddings you pass."
        )


def _same_text(text: torch.Tensor, noted: torch.Tensor | None) -> bool:
    """Whether embeddings (rows, tokens, width) are the noted ones but for rounding, token by token.

    Not as a whole: the start token, which is the same in every prompt, is far longer than all others in CLIP.
    """
    if noted is None or text.shape != noted.shape:
        return False
    text, noted = text.detach().float(), noted.detach().to(text.device).float()
    return bool(((text - noted).norm(dim=-1) <= ROUNDING * noted.norm(dim=-1)).all())


@contextmanager
def watch_prompts(
    base: Any,
    begin: Callable[[Call], None],
    prompts: str | Sequence[str] | None = None,
    needed: bool = True,
) -> Iterator[None]:
    """Tell `begin` of each pipeline call inside the context, and keep the call's step and halves up to date.

    The pipeline's own `encode_prompt` is wrapped while the context is open (on this instance only). It is the one
    place where a Stable Diffusion pipeline's prompts, `num_images_per_prompt` and embeddings are all known, and every
    pipeline of the family (text to image, img2img, inpainting, ControlNet) passes through it once, before the first
    step. A hook on the tokenizer would see negative prompts too, and would not know which is which.

    Parameters
    ----------
    base : pipeline or Module
        A module has no `encode_prompt`: then no prompts can be known.
    begin : callable (Call)
        Called at once if `prompts` are given, and at each `encode_prompt`.
    prompts : str or list of str, optional
        For U-Nets that are called directly, and for pipelines that are called with `prompt_embeds`.
    needed : bool
        If False, a call whose prompts are unknown is not refused.

    Raises
    ------
    ValueError
        At once if `base` has no `encode_prompt` and the prompts are needed. Inside the context, from the pipeline call,
        if it is given `prompt_embeds` while `prompts` are unknown, or a prompt that is not the one announced; from the
        U-Net call, as `Call.next` says, and if no prompt is known yet.
    """
    announced = [prompts] if isinstance(prompts, str) else list(prompts) if prompts is not None else None
    original = getattr(base, "encode_prompt", None)
    if original is None and needed:
        raise ValueError(f"{type(base).__name__} has no `encode_prompt` to read prompts from: pass the pipeline.")
    current: Call | None = None

    def note(call: Call) -> None:
        nonlocal current
        begin(call)
        current = call

    def count(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if current is None:
            raise ValueError("No prompt is known yet: call the pipeline itself, or open the context with prompts.")
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        current.next(text[0] if isinstance(text, tuple) else text)  # with IP-Adapter, (text, pictures)

    if announced is not None and original is not None:
        note(Call(announced, _Encoded(base, announced)))
    elif not needed:
        note(Call([], lambda: (None, None)))
    unet = base if original is None else base.unet
    counting = unet.register_forward_pre_hook(count, with_kwargs=True)
    try:
        if original is None:
            yield
        else:
            with _wrapped(base, original, announced, needed, note):
                yield
    finally:
        counting.remove()


class _Encoded:
    """The embeddings of announced prompts, computed if a U-Net call asks for them: the text encoder may be gone."""

    def __init__(self, base: Any, prompts: list[str]) -> None:
        self.base, self.prompts, self.found = base, prompts, None

    @torch.no_grad()
    def __call__(self) -> Any:
        if self.found is None:
            self.found = type(
                self.base
            ).encode_prompt(  # not the instance's own, at which contexts listen
                self.base,
                prompt=self.prompts,
                device=self.base._execution_device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
            )[:2]
        return self.found


@contextmanager
def _wrapped(
    base: Any, original: Any, announced: list[str] | None, needed: bool, note: Callable[[Call], None]
) -> Iterator[None]:
    """`note` hears of each call of `base.encode_prompt`."""
    signature = inspect.signature(original)

    @wraps(original)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        rows = _prompts_of_call(given, announced, needed)
        images = given.get("num_images_per_prompt") or 1
        encoded = original(*args, **kwargs)
        note(Call([prompt for prompt in rows for _ in range(images)], lambda: encoded[:2]))
        return encoded

    shadowed = vars(base).get("encode_prompt")  # an outer context's wrapper
    base.encode_prompt = encode_prompt
    try:
        yield
    finally:
        if shadowed is None:
            del base.encode_prompt
        else:
            base.encode_prompt = shadowed


def _prompts_of_call(given: dict[str, Any], announced: list[str] | None, needed: bool) -> list[str]:
    prompt, embeds = given.get("prompt"), given.get("prompt_embeds")
    if prompt is None:
        if announced is None and needed:
            raise ValueError("The pipeline was called with `prompt_embeds`, which hide the words: pass `prompts=` too.")
        rows = announced or [""]
        count = len(rows) if embeds is None else len(embeds)
        rows = rows * count if len(rows) == 1 else rows
    else:
        rows = [prompt] if isinstance(prompt, str) else list(prompt)
        count = len(rows)
    if announced is not None:
        expected = announced * count if len(announced) == 1 else announced
        if len(expected) != count or (prompt is not None and rows != expected):
            raise ValueError(
                f"The pipeline was called for {count} prompts, {rows!r}, but the context was opened for {announced!r}."
            )
        rows = expected
    return rows
