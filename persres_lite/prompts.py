"""Where words stand in a prompt, and which prompt stands behind each row of a U-Net call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

END_OF_WORD = "</w>"


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


@contextmanager
def watch_prompts(
    base: Any,
    note: Callable[[list[str], bool | None], None],
    prompts: str | Sequence[str] | None = None,
    needed: bool = True,
) -> Iterator[None]:
    """Tell `note` which prompts each pipeline call inside the context works on.

    The pipeline's own `encode_prompt` is wrapped while the context is open (on this instance only). It is the one
    place where a Stable Diffusion pipeline's prompts, `num_images_per_prompt` and guidance are all known, and every
    pipeline of the family (text to image, img2img, inpainting, ControlNet) passes through it once, before the first
    step. A hook on the tokenizer would see negative prompts too, and would not know which is which.

    Parameters
    ----------
    base : pipeline or Module
        A module has no `encode_prompt`: then `prompts` must be given.
    note : callable (prompts, guided)
        Called at once if `prompts` are given, and at each `encode_prompt`: one prompt for each image, in the order of
        the batch, and whether guidance doubles the batch (None if unknown).
    prompts : str or list of str, optional
        For U-Nets that are called directly, and for pipelines that are called with `prompt_embeds`.
    needed : bool
        If False, unknown prompts are told as empty ones instead of refused.

    Raises
    ------
    ValueError
        Inside the context, from the pipeline call: if it is given `prompt_embeds` while `prompts` are unknown, or a
        prompt that is not the one announced.
    """
    announced = [prompts] if isinstance(prompts, str) else list(prompts) if prompts is not None else None
    if announced is not None:
        note(announced, None)
    original = getattr(base, "encode_prompt", None)
    if original is None:
        if announced is None and needed:
            raise ValueError(f"{type(base).__name__} has no `encode_prompt` to read prompts from: pass `prompts=`.")
        yield
        return
    signature = inspect.signature(original)

    @wraps(original)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        rows = _prompts_of_call(given, announced, needed)
        images = given.get("num_images_per_prompt") or 1
        note([prompt for prompt in rows for _ in range(images)], given.get("do_classifier_free_guidance"))
        return original(*args, **kwargs)

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


def count_conditional(batch: int, images: int, guided: bool | None) -> int:
    """How many of the last rows of a U-Net call belong to the prompts: all without guidance, else the second half.

    Read anew at every call, since a callback may switch guidance off in mid-run (`SDCFGCutoffCallback`).

    Raises
    ------
    ValueError
        If the batch is neither one nor two rows an image (perturbed-attention guidance, InstructPix2Pix).
    """
    if batch == images or (batch == 2 * images and guided is not False):
        return images
    raise ValueError(
        f"The U-Net was called with {batch} rows for {images} images: expected one row an image, or two with guidance."
    )
