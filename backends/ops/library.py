"""How an op of the `et_moe` namespace is declared: once, from its eager reference."""

import re
from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("et_moe", "DEF")


def _letters(schema: str) -> str:
    """Names alias sets by a letter: ExecuTorch's schema parser takes `a!`, not torch's `a0!`."""
    names = iter("abcdefgh")
    return re.sub(r"\(a\d+!\)", lambda _: f"({next(names)}!)", schema)


def declare(fake: Callable, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Registers the decorated eager reference as `torch.ops.et_moe.<name>`.

    The schema comes from the reference's type hints. Besides the functional form an `.out` form is
    registered, which is the one that an ExecuTorch program names and a C++ kernel implements.

    Args:
        fake: same signature as the reference; returns empty tensors of the results' shapes.
        mutates: names of the arguments that are updated in place.

    Returns:
        A decorator that returns the reference unchanged: calling it directly is eager PyTorch.
    """

    def register(reference: Callable) -> Callable:
        name = reference.__name__
        schema = _letters(torch.library.infer_schema(reference, mutates_args=mutates))
        arguments, returns = schema[1:].rsplit(") -> ", 1)
        count = returns.count("Tensor")
        names = ["out"] if count == 1 else [f"out{i}" for i in range(count)]
        outs = [f"Tensor({'xyz'[i]}!)" for i in range(count)]
        LIBRARY.define(name + schema)
        LIBRARY.define(
            f"{name}.out({arguments}, *, {', '.join(map(' '.join, zip(outs, names, strict=True)))})"
            f" -> {outs[0] if count == 1 else '(' + ', '.join(outs) + ')'}"
        )

        def out_form(*args, **kwargs):
            targets = [kwargs.pop(n) for n in names]
            results = reference(*args, **kwargs)
            for target, result in zip(targets, [results] if count == 1 else results, strict=True):
                target.copy_(result)
            return targets[0] if count == 1 else tuple(targets)

        LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        LIBRARY.impl(f"{name}.out", out_form, "CompositeExplicitAutograd")
        torch.library.register_fake(f"et_moe::{name}", fake, lib=LIBRARY)
        return reference

    return register
