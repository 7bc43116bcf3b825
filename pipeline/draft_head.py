"""A shortened vocabulary for drafts: a copy of the first rows of the model's head.

Drafts need not be complete, only cheap: what the model draws decides. Tokenizers of byte-level BPE
number tokens in the order of their merges, the most frequent first, so that the first ids are those
that a text has most of. (FR-Spec, https://arxiv.org/abs/2502.14856, ranks tokens by counting them.)
"""

from collections.abc import Iterable, Iterator

from torch import Tensor

from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.models import HEAD, MTP

DRAFT_HEAD = f"{MTP}draft_head."
"""In front of the names of the copy's tensors, which otherwise are those of the head's."""


def check_draft_vocabulary(vocabulary: int, all_tokens: int, draft_tokens: int) -> None:
    """Raises ConfigError, which names the flag."""
    if not 0 <= vocabulary <= all_tokens:
        expected = f"0 to {all_tokens}, the model's"
    elif vocabulary and not draft_tokens:
        expected = "--draft-tokens, too"
    else:
        return
    raise ConfigError(f"--draft-vocabulary {vocabulary}: expected {expected}")


def with_draft_head(
    groups: Iterable[dict[str, Tensor]], vocabulary: int
) -> Iterator[dict[str, Tensor]]:
    """The parameters of a model, group by group; those of the MTP head, which come behind the
    head's, get the first `vocabulary` rows of the tensors that are kept of the head, if not 0."""
    copy: dict[str, Tensor] = {}
    for group in groups:
        if vocabulary and any(name.startswith(MTP) for name in group):
            group |= copy
        for name, tensor in group.items():
            if name.startswith(HEAD):
                copy[DRAFT_HEAD + name.removeprefix(HEAD)] = tensor[:vocabulary].clone()
        yield group
