"""Bits of keys and values for each layer, found on a model and a text (as KVTuner, 2502.04420).

A layer's sensitivity to a pair of widths is the relative error of its attention outputs, as in the
paper, which searches pairs of 2, 4 and 8 bits with a multi-objective optimizer on a task. Here a
greedy search lowers the sum of squared errors, which needs no task, and there are 3 bits as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kivi.evals.attention_error import AttentionInputs, MakeLayer, attention_errors

Pair = tuple[int, int]
"""Bits of keys and of values."""
PAIRS: tuple[Pair, ...] = tuple((k, v) for k in (2, 3, 4, 8) for v in (2, 3, 4, 8))


def sensitivities(
    inputs: Sequence[AttentionInputs],
    make_layer: Callable[[Pair], MakeLayer],
    *,
    prefill: int,
    pairs: Sequence[Pair] = PAIRS,
    chunk: int = 32,
) -> list[dict[Pair, float]]:
    """For each layer the relative error of its attention outputs at each pair of widths.

    Args:
        inputs: from `record_attention`.
        make_layer: makes the empty layer caches of a pair.
        prefill: see `attention_errors`.
        pairs: which to try.
        chunk: see `attention_errors`.

    Raises:
        ValueError: as `attention_errors`.
    """
    errors = {
        p: attention_errors(inputs, make_layer(p), prefill=prefill, chunk=chunk) for p in pairs
    }
    return [{p: errors[p][i] for p in pairs} for i in range(len(inputs))]


def choose_pairs(errors: Sequence[Mapping[Pair, float]], bits: float) -> list[Pair]:
    """A pair for each layer, of at most so many bits on average, greedily.

    Every layer starts with its cheapest pair; the change that lowers the sum of squared errors most
    for each bit follows, until none fits.

    Args:
        errors: from `sensitivities`.
        bits: mean of key and value bits, scales and zeros not counted.

    Raises:
        ValueError: if the cheapest pairs are more than that.
    """
    chosen = [min(own, key=lambda p: (sum(p), own[p])) for own in errors]
    budget = 2 * bits * len(errors) + 1e-9
    if not sum(map(sum, chosen)) <= budget:  # NaN is no budget either
        least = sum(map(sum, chosen)) / 2 / len(errors)
        raise ValueError(f"bits={bits} is not allowed; the cheapest pairs have {least:g}")
    while True:
        spent, changes = sum(map(sum, chosen)), []
        for i, own in enumerate(errors):
            for pair in own:
                more = sum(pair) - sum(chosen[i])
                gain = own[chosen[i]] ** 2 - own[pair] ** 2
                if gain > 0 and 0 <= more <= budget - spent:
                    changes.append((gain / more if more else float("inf"), gain, i, pair))
        if not changes:
            return chosen
        _, _, layer, pair = max(changes)
        chosen[layer] = pair
