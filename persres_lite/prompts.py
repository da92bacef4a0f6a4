"""Where words stand in a prompt, and which rows of a U-Net call are the prompts'."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.nn import functional as F

END_OF_WORD = "</w>"

ROUNDING = 0.05
"""By how much the direction of a token's embedding may differ from itself when it is computed again in another batch or
in half precision. Between two words it differs by several tenths.
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
    whole = set(tokenizer.get_added_vocab()) | set(tokenizer.all_special_tokens)
    ends = [piece in whole or piece.endswith(END_OF_WORD) for piece in tokenizer.convert_ids_to_tokens(ids)]

    def find(phrase: str) -> set[int]:
        """Places of all its pieces, wherever they stand one after the other and at the bounds of words."""
        sought = tokenizer(phrase, add_special_tokens=False).input_ids
        found: set[int] = set()
        for i in range(1, len(ids) - len(sought)):
            after = i + len(sought)
            if ids[i:after] == sought and ends[i - 1] and ends[after - 1]:
                found.update(range(i, after))
        return found

    wanted = [words] if isinstance(words, str) else list(words)
    parts = [part for phrase in wanted for part in ([phrase] if find(phrase) else phrase.split())]
    missing = ", ".join(repr(part) for part in parts if not find(part))
    if missing:
        raise ValueError(f'The prompt "{prompt}" does not contain {missing}: it needs the words "{" ".join(wanted)}".')
    positions = sorted(set().union(*map(find, parts)))
    limit = tokenizer.model_max_length
    if positions[-1] >= limit - 1:  # the last place is the end token's
        said = f'The prompt "{prompt}" has {len(ids)} tokens and is cut off at {limit}, before the end of'
        raise ValueError(f'{said} "{" ".join(wanted)}": move these words to the front or shorten it.')
    return positions


def find_words(base: Any, prompts: Sequence[str], words: str | Sequence[str]) -> list[list[int]]:
    """`token_positions` of the same words in each prompt, with the pipeline's own tokenizer.

    Embeddings of several vectors (textual inversion) are spelled out first, as the pipeline does. XL's two tokenizers
    count alike; the first is asked.
    """
    tokenizer = getattr(base, "tokenizer", None) or base.tokenizer_2
    convert = getattr(base, "maybe_convert_prompt", lambda text, _: text)
    phrases = [convert(phrase, tokenizer) for phrase in ([words] if isinstance(words, str) else words)]
    return [token_positions(tokenizer, convert(prompt, tokenizer), phrases) for prompt in prompts]


def words_of(prompt: str) -> list[str]:
    """The words of a prompt, without punctuation and repetition, in order."""
    stripped = (word.strip(".,;:!?\"'()[]") for word in prompt.split())
    return list(dict.fromkeys(word for word in stripped if word))


class Call:
    """One pipeline call: its prompts, and which of its U-Net calls is at work.

    Parameters
    ----------
    base : pipeline
        Whose tokenizer finds words.
    prompts : list of str
        One for each image, in the order of the batch; of XL those that its first encoder reads. Empty if they are not
        known: then every row counts.
    encoded : tensor (images, T, width)
        What the prompts were encoded to.

    Attributes
    ----------
    step : int
        Number of the U-Net call, counted from 0; -1 before the first.
    rows, others : slice and slice or None
        Which of its rows are the prompts', and under guidance which are the negative prompts'.
    """

    def __init__(self, base: Any, prompts: list[str], encoded: Any) -> None:
        self.base, self.prompts, self.encoded = base, prompts, encoded
        self.step, self.rows = -1, slice(0, 0)
        self.others: slice | None = None
        self._text: Any = None  # of the latest U-Net call

    def columns(self, words: Sequence[str | Sequence[str]], needed: bool = True) -> torch.Tensor:
        """1 where words stand in each prompt and 0 elsewhere: (images, T, words). If not `needed`, some may be missing.

        Raises
        ------
        ValueError
            If a prompt lacks one of the words.
        """
        columns = torch.zeros(len(self.prompts), self.encoded.shape[1], len(words), device=self.encoded.device)
        for column, each in enumerate(words):
            for row, prompt in enumerate(self.prompts):
                if needed or each in words_of(prompt):
                    columns[row, find_words(self.base, [prompt], each)[0], column] = 1
        return columns

    def next(self, text: torch.Tensor) -> None:
        """A U-Net call begins: count it, and find out which rows belong to the prompts.

        They are known by their text: it is compared with what the prompts were encoded to. So it does not matter in
        which order the halves stand, or whether a callback ends guidance in mid-run (`SDCFGCutoffCallback`).

        Parameters
        ----------
        text : tensor (rows, T, width)
            The U-Net's `encoder_hidden_states`.

        Raises
        ------
        ValueError
            If the rows are neither one nor two an image (perturbed-attention guidance, InstructPix2Pix), or if none of
            them have the prompts' text.
        """
        self.step += 1
        if text is self._text:  # a pipeline passes the same tensor at every step: one comparison a run
            return
        images = len(self.prompts) or len(text)
        groups = [slice(start, start + images) for start in range(0, len(text), images)]
        ours = [group for group in groups if not self.prompts or _same_text(text[group], self.encoded)]
        if not ours or len(groups) > 2:
            raise ValueError(
                f"The U-Net was called with {len(text)} rows of text that are not {self.prompts!r}, with or without a "
                "negative half: call the pipeline itself, or open the context with the prompts whose embeddings you "
                "pass, just as they are encoded here."
            )
        self.rows, self._text = ours[-1], text  # both groups are, if the negative prompt is the prompt itself
        self.others = next((group for group in groups if group != self.rows), None)


def _same_text(text: torch.Tensor, noted: torch.Tensor) -> bool:
    """Whether embeddings (rows, T, width) have the noted ones' directions, token by token: weights may stretch them."""
    if text.shape != noted.shape:
        return False
    ours, theirs = (F.normalize(each.detach().to(text.device).float(), dim=-1) for each in (text, noted))
    return bool(((ours - theirs).norm(dim=-1) <= ROUNDING).all())


@contextmanager
def watch_prompts(
    base: Any, begin: Callable[[Call], None], prompts: str | Sequence[str] | None = None, needed: bool = True
) -> Iterator[None]:
    """Tell `begin` of each pipeline call inside the context, and keep the call's step and rows up to date.

    The pipeline's own `encode_prompt` is wrapped while the context is open (on this instance only). It is the one
    place where a Stable Diffusion pipeline's prompts and embeddings are both known, and every pipeline of the family
    (text to image, img2img, inpainting, ControlNet) passes through it once, before the first step. A hook on the
    tokenizer would see negative prompts too, and would not know which is which.

    Parameters
    ----------
    base : pipeline
        What is called.
    begin : callable (Call)
        Called at once if `prompts` are given or not needed, and at each `encode_prompt`.
    prompts : str or list of str, optional
        For U-Nets that are called directly, and for pipelines that are called with `prompt_embeds`.
    needed : bool
        If False, a call whose prompts are unknown is not refused.

    Raises
    ------
    ValueError
        Inside the context, from the pipeline call if it is given `prompt_embeds` while `prompts` are unknown; from the
        U-Net call, as `Call.next` says, and if no prompt is known yet.
    """
    announced = [prompts] if isinstance(prompts, str) else list(prompts or [])
    latest: list[Call] = []

    def start(prompts: list[str], encoded: Any) -> None:
        latest[:] = [Call(base, prompts, encoded)]
        begin(latest[0])

    def hear(given: dict[str, Any], encoded: torch.Tensor) -> None:
        if given.get("prompt") is None and needed and not announced:
            raise ValueError("The pipeline was called with `prompt_embeds`, which hide the words: pass `prompts=` too.")
        texts = announced or given.get("prompt") or ""
        texts = [texts] if isinstance(texts, str) else texts
        each = [text for text in texts for _ in range(max(1, len(encoded) // len(texts)))]  # one an image
        start(each, _encode(base, each, encoded) if announced else encoded)

    def count(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if not latest:
            raise ValueError("No prompt is known yet: call the pipeline itself, or open the context with prompts.")
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        latest[0].next(text[0] if isinstance(text, tuple) else text)  # with IP-Adapter, (text, pictures)

    encoded = _encode(base, announced) if announced else None
    if encoded is not None or not needed:
        start(announced, encoded)
    counting = base.unet.register_forward_pre_hook(count, with_kwargs=True)
    try:
        with _listening(base, hear):
            yield
    finally:
        counting.remove()


@torch.no_grad()
def _encode(base: Any, prompts: list[str], known: Any = None) -> Any:
    """What announced prompts are encoded to, (images, T, width); `known` if the text encoders are gone."""
    if not (getattr(base, "text_encoder", None) or getattr(base, "text_encoder_2", None)):
        return known
    how = {"device": base._execution_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    return type(base).encode_prompt(base, prompt=prompts, **how)[0]  # not the instance's own, at which contexts listen


@contextmanager
def _listening(base: Any, hear: Callable[[dict[str, Any], torch.Tensor], None]) -> Iterator[None]:
    """`hear` is told of each `base.encode_prompt`: what it was given, and what it gave for the prompts."""
    encode, own = base.encode_prompt, vars(base).get("encode_prompt")  # an outer context's, perhaps

    @wraps(encode)
    def listening(*args: Any, **kwargs: Any) -> Any:
        encoded = encode(*args, **kwargs)
        hear(inspect.signature(encode).bind(*args, **kwargs).arguments, encoded[0])
        return encoded

    base.encode_prompt = listening
    try:
        yield
    finally:
        del base.encode_prompt
        if own:
            base.encode_prompt = own
