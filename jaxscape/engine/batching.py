"""The work that the engine is given: prompts as token ids, and at how many points they are answered."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from jaxscape.engine.sampling import Sampling
from jaxscape.models.encoding import encode
from jaxscape.models.model import Model
from jaxscape.prompts.chat_format import chat_texts

LENGTH_MULTIPLE = 16  # lengths in tokens are padded to a multiple of this, so that programs are compiled for few shapes


@dataclass(frozen=True)
class Workload:
    """Prompts to answer at each point of the direction sets of a scan.

    Attributes:
        prompt_tokens: token ids of each prompt in the model's chat format.
        num_points: number of points of each direction set.
        points_per_line: number of consecutive points that differ in their last coordinate only.
        ndim: number of directions of each set.
        num_random: how many of these directions are those of `random:SEED`, which need not be stored: the engine can
            draw them from their seeds.
        num_waiting, num_made: how many of the others are stored with all their tensors, in float32: those that wait in
            host memory until the run reaches the set, and those that are made then. As of random ones, this is the
            largest number in any set.
        block: number of prompts that are answered together at a point, in blocks of which a point may need only the
            first ones; None for all.
        num_sets: number of direction sets.
        rank: the largest rank of the directions, if all of them are of low rank; else None.
        first_prompt: the number of the first prompt, from which the random streams of sampling count.
        longest_before: number of tokens of the longest prompt before the first one; 0 if there is none.
    """

    prompt_tokens: Sequence[Sequence[int]]
    sampling: Sampling
    num_points: int = 1
    points_per_line: int = 1
    ndim: int = 0
    num_random: int = 0
    num_waiting: int = 0
    num_made: int = 0
    block: int | None = None
    num_sets: int = 1
    rank: int | None = None
    first_prompt: int = 0
    longest_before: int = 0

    def after(self, count: int) -> "Workload":
        """The workload without its first `count` prompts, in which the others get the same answers."""
        return replace(
            self,
            prompt_tokens=self.prompt_tokens[count:],
            first_prompt=self.first_prompt + count,
            longest_before=self.longest_prompt,
        )

    @property
    def longest_prompt(self) -> int:
        """Number of tokens of the longest prompt, also of those before the first one."""
        return max(self.longest_before, *map(len, self.prompt_tokens))

    @property
    def num_prompts(self) -> int:
        return len(self.prompt_tokens)

    @cached_property
    def prefix_length(self) -> int:
        """Length in tokens of the beginning that all prompts share, see `common_prefix`."""
        return common_prefix(self.prompt_tokens)

    @cached_property
    def own_lengths(self) -> tuple[int, ...]:
        """Number of tokens of each prompt after the common prefix."""
        return tuple(len(tokens) - self.prefix_length for tokens in self.prompt_tokens)

    @property
    def ring_slots(self) -> int:
        """Number of cache slots in a row's ring: for the longest prompt without prefix, padded, and the new tokens."""
        return padded_length(max(self.own_lengths)) + self.sampling.max_new_tokens


def tokenize(
    model: Model,
    prompts: Sequence[str],
    system_prompt: str,
    max_new_tokens: int,
    thinking: str = "default",
) -> list[list[int]]:
    """The token ids of each prompt in the model's chat format; see `chat_texts` and `encode`."""
    return encode(model, chat_texts(model.tokenizer, prompts, system_prompt, thinking), max_new_tokens)


def common_prefix(prompt_tokens: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, leaving each prompt at least one token of its own."""
    shortest = min(map(len, prompt_tokens)) - 1
    first = prompt_tokens[0]
    return next((i for i in range(shortest) if any(tokens[i] != first[i] for tokens in prompt_tokens)), shortest)


def padded_length(length: int) -> int:
    """The length rounded up to a multiple of `LENGTH_MULTIPLE`."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def bucket(length: int) -> int:
    """The width in tokens to which texts are padded whose longest has `length` tokens.

    It is the smallest of 32, 48, 64, 96, 128, 192, … that is not less than `length`. Programs are compiled once for
    each width, so there should be few widths; with two for each doubling, little of a batch is padding.
    """
    power = 2 ** max(5, math.ceil(math.log2(length)))
    return power * 3 // 4 if power > 32 and length <= power * 3 // 4 else power
