"""Every metric against a computation by hand, on fakes to be worked out and on a tiny model."""

import copy
import itertools
import math
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from one_thread import one_thread  # noqa: F401 - a fixture for this module
from tiny_models import tiny_bytes
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from kivi import KVQuantizer
from kivi.evals import ablation, attention_error, decoding, feeding, retrieval
from kivi.evals import environment as environments
from kivi.evals.intervals import Interval, block_bootstrap, mean, p999, wilson
from kivi.evals.passkey import PasskeySample
from kivi.hf import KVCache

VOCAB = 12


class FakeCache:
    """Remembers every token; `forgets` drops the first tokens when the prompt is loaded."""

    def __init__(self, shift: float = 0.0, forgets: int = 0) -> None:
        self.ids: list[list[int]] = []
        self.shift, self.forgets, self.loaded = shift, forgets, 0
        self.steps: list[int] = []

    @property
    def layers(self) -> list[SimpleNamespace]:
        states = torch.zeros(len(self.ids), 1, len(self.ids[0]), 4)
        return [SimpleNamespace(keys=states, values=states)]

    def prefill_from(self, exact: "FakeCache") -> None:
        self.loaded += 1
        self.ids = [row[self.forgets :] for row in exact.ids]

    def store(self, ids: Tensor) -> None:
        self.steps.append(ids.shape[1])
        rows = ids.tolist()
        self.ids = [a + b for a, b in zip(self.ids or [[] for _ in rows], rows, strict=True)]


class FakeModel:
    """Logits depend on the token and on how lossy the cache is; digits are copied from the prompt.

    Token 1 in the last place means "after the question, say what followed the 1 before".
    """

    device = torch.device("cpu")

    def __init__(self, positions: int = 64) -> None:
        self.table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3))
        text = SimpleNamespace(max_position_embeddings=positions, num_key_value_heads=1)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def forward(
        self, input_ids: Tensor, past_key_values: FakeCache | None = None, use_cache: bool = True
    ) -> SimpleNamespace:
        cache = FakeCache() if past_key_values is None else past_key_values
        cache.store(input_ids)
        logits = self.table[input_ids].clone()
        logits[..., 0] += cache.shift
        return SimpleNamespace(logits=logits, past_key_values=cache)

    __call__ = forward


class CopyingModel(FakeModel):
    """Continues what followed the earlier token 1: an induction head over the cache's tokens."""

    def forward(
        self, input_ids: Tensor, past_key_values: FakeCache | None = None, use_cache: bool = True
    ) -> SimpleNamespace:
        cache = FakeCache() if past_key_values is None else past_key_values
        cache.store(input_ids)
        logits = torch.zeros(*input_ids.shape, VOCAB)
        for row, ids in enumerate(cache.ids):
            last = len(ids) - 1 - ids[::-1].index(1)
            if 1 in ids[:last]:
                said = len(ids) - 1 - last
                logits[row, -1, ids[ids.index(1) + 1 + said]] = 1.0
        return SimpleNamespace(logits=logits, past_key_values=cache)

    __call__ = forward


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(("k", "n"), [(0, 5), (3, 20), (17, 20), (40, 40)])
def test_wilson_bounds_solve_the_score_equation(k: int, n: int) -> None:
    interval = wilson(k, n)
    assert interval.estimate == k / n and interval.low <= k / n <= interval.high
    for bound in interval[1:]:
        if bound not in (0.0, 1.0):
            z = abs(k / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert z == pytest.approx(1.959964, rel=1e-6)


def test_wilson_refuses_nonsense() -> None:
    for k, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="successes"):
            wilson(k, n)


def test_bootstrap_is_what_a_loop_says() -> None:
    values = torch.rand(3, 10, dtype=torch.float64)
    interval = block_bootstrap(values, seed=5, block=4, resamples=50)
    blocks = [values[s, i : i + 4].tolist() for s in range(3) for i in (0, 4)]
    drawn = torch.randint(6, (50, 6), generator=torch.Generator().manual_seed(5)).tolist()
    means = sorted(sum(sum(blocks[i]) for i in row) / 24 for row in drawn)
    assert interval.estimate == pytest.approx(values.mean().item())
    # Quantile 0.025 of 50 values lies between the second and the third.
    assert interval.low == pytest.approx(means[1] + 0.225 * (means[2] - means[1]))
    assert interval.high == pytest.approx(means[-3] + 0.775 * (means[-2] - means[-3]))
    assert interval == block_bootstrap(values, seed=5, block=4, resamples=50)
    assert interval != block_bootstrap(values, seed=6, block=4, resamples=50)


def test_bootstrap_matches_theory_for_independent_values() -> None:
    values = torch.randn(1, 4000)
    interval = block_bootstrap(values, mean, block=1, resamples=2000)
    half = (interval.high - interval.low) / 2
    assert half == pytest.approx(1.96 * values.std().item() / math.sqrt(4000), rel=0.1)


@pytest.mark.parametrize("count", [1, 2, 500, 1001, 2001, 5432])
def test_p999_is_the_interpolated_order_statistic(count: int) -> None:
    values = torch.rand(3, count, dtype=torch.float64)
    torch.testing.assert_close(p999(values), values.quantile(0.999, dim=-1))
    assert p999(torch.arange(2001.0).flip(0)) == 1998.0


def test_bootstrap_refuses_no_values() -> None:
    with pytest.raises(ValueError, match="not empty"):
        block_bootstrap(torch.zeros(2, 0))


def test_interval_exp() -> None:
    assert Interval(0.0, -1.0, 1.0).exp() == (1.0, math.exp(-1), math.exp(1))


# ---------------------------------------------------------------- feeding


def test_text_windows_are_stretches_that_do_not_overlap() -> None:
    text = torch.arange(100)
    rows = feeding.text_windows(text, count=4, length=21, seed=1, bos=777)
    assert rows.shape == (4, 21) and (rows[:, 0] == 777).all()
    assert (rows[:, 2:] - rows[:, 1:-1] == 1).all()
    assert (rows[1:, 1] > rows[:-1, -1]).all()
    assert torch.equal(rows, feeding.text_windows(text, count=4, length=21, seed=1, bos=777))
    assert not torch.equal(rows, feeding.text_windows(text, count=4, length=21, seed=2, bos=777))
    assert torch.equal(feeding.text_windows(text, count=1, length=100)[0], text)


def test_text_windows_name_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"100 tokens; 3 sequences of 50 tokens need 150"):
        feeding.text_windows(torch.arange(100), count=3, length=50)
    with pytest.raises(ValueError, match="at least 1"):
        feeding.text_windows(torch.arange(100), count=0, length=50)


def test_cache_size_of_tensors_and_of_an_own_account() -> None:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(3, 2, 5, 8), torch.zeros(3, 2, 5, 4), layer)
    assert feeding.cache_size(cache) == (2 * 3 * 2 * 5 * 12 * 4,) * 2
    own = SimpleNamespace(nbytes=lambda: SimpleNamespace(allocated=9, used=7))
    assert feeding.cache_size(own) == (9, 7)


def test_work_counts_short_steps_as_what_they_cost() -> None:
    assert feeding.work(2, 100) == 200 and feeding.work(2, 1) == 64
    assert feeding.work_in_chunks(2, 70, 64) == 2 * (64 + 32)


def test_prefix_is_loaded_or_prefilled() -> None:
    model, ids = tiny_bytes(), torch.randint(257, (2, 9))
    prefix = feeding.exact_prefix(model, ids)
    assert prefix.complete and prefix.size == feeding.cache_size(prefix.cache)
    loaded = feeding.start_cache(
        model, FakeCache, SimpleNamespace(complete=True, cache=FakeCache())
    )
    assert loaded.loaded == 1
    prefilled = feeding.start_cache(model, DynamicCache, prefix)
    torch.testing.assert_close(prefilled.layers[1].keys, prefix.cache.layers[1].keys)
    prefix.cache.layers[0].keys = prefix.cache.layers[0].keys[:, :, 1:]
    assert not prefix.complete
    state = SimpleNamespace(layers=[SimpleNamespace()])
    assert not feeding.Prefix(ids, state, prefix.size).complete


def test_chunks_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="chunk=0"):
        next(feeding.feed(FakeModel(), FakeCache(), torch.zeros(1, 2), 0))


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_decode_scores_by_hand(chunk: int) -> None:
    model, texts = FakeModel(), torch.randint(VOCAB, (2, 14))
    exact = decoding.reference(model, texts, prefill=4)
    made: list[FakeCache] = []

    def make_cache() -> FakeCache:
        made.append(FakeCache(shift=0.7))
        return made[-1]

    scores = decoding.compare(model, make_cache, exact, chunk=chunk)
    assert made[0].loaded == 1 and max(made[0].steps) == min(chunk, 9)
    assert sum(made[0].steps) == 9
    for row in range(2):
        for i, position in enumerate(range(4, 13)):
            logits = model.table[texts[row, position]].double()
            p = [math.exp(x) for x in logits.tolist()]
            q = [math.exp(x + 0.7 * (j == 0)) for j, x in enumerate(logits.tolist())]
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
            target = texts[row, position + 1]
            assert scores.nll[row, i].item() == pytest.approx(-math.log(q[target]), abs=1e-5)
            assert exact.nll()[row, i].item() == pytest.approx(-math.log(p[target]), abs=1e-5)
            kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            assert scores.kl[row, i].item() == pytest.approx(kl, abs=1e-5)
            same = p.index(max(p)) == q.index(max(q))
            assert bool(scores.top1[row, i]) == same
    assert scores.size == feeding.cache_size(made[0])


def test_summary_by_hand() -> None:
    nll, kl = torch.rand(3, 40), torch.rand(3, 40)
    top1, size = torch.rand(3, 40) > 0.3, feeding.CacheSize(10, 5)
    parts = [
        decoding.TokenScores(nll[i : i + n], kl[i : i + n], top1[i : i + n], size)
        for i, n in ((0, 2), (2, 1))
    ]
    summary = decoding.summarize(parts, seed=3)
    assert summary.perplexity.estimate == pytest.approx(math.exp(nll.mean()))
    assert summary.kl_mean.estimate == pytest.approx(kl.mean().item())
    ordered = sorted(kl.flatten().tolist())
    p = 0.999 * 119 - 118
    assert summary.kl_p999.estimate == pytest.approx(ordered[-2] * (1 - p) + ordered[-1] * p)
    assert summary.top1.estimate == pytest.approx(top1.float().mean().item())
    assert summary.perplexity.low < summary.perplexity.estimate < summary.perplexity.high
    assert summary.tokens == 120 and summary.size == size
    assert summary == decoding.summarize(parts, seed=3) != decoding.summarize(parts, seed=4)
    with pytest.raises(ValueError, match="nothing was evaluated"):
        decoding.summarize([])


def test_lossless_cache_is_lossless_at_any_chunk() -> None:
    model, texts = tiny_bytes(), torch.randint(257, (2, 80))
    exact = decoding.reference(model, texts, prefill=20)
    logits = model(texts).logits[:, 20:-1].double().log_softmax(-1)  # one forward, no cache
    nll = F.nll_loss(logits.flatten(0, 1), texts[:, 21:].flatten(), reduction="none")
    for chunk in (1, 7, 32, 100):
        scores = decoding.compare(model, DynamicCache, exact, chunk=chunk)
        torch.testing.assert_close(scores.nll.flatten().double(), nll, atol=1e-4, rtol=0)
        assert scores.kl.abs().max() < 1e-6 and scores.top1.all()


def test_reference_is_not_changed_by_those_who_use_it() -> None:
    model, texts = tiny_bytes(), torch.randint(257, (2, 40))
    exact = decoding.reference(model, texts, prefill=20)
    before = copy.deepcopy(exact.prefix.cache)
    decoding.compare(model, DynamicCache, exact, chunk=5)
    assert exact.prefix.cache.get_seq_length() == 20
    assert torch.equal(exact.prefix.cache.layers[0].keys, before.layers[0].keys)


@pytest.mark.parametrize(
    ("shape", "prefill", "message"),
    [((1, 5), 4, "leave nothing"), ((1, 5), 0, "prefill=0"), ((1, 90), 4, "context=89 .* 64")],
)
def test_reference_refuses(shape: tuple[int, int], prefill: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoding.reference(FakeModel(), torch.zeros(shape, dtype=torch.int64), prefill=prefill)


# ---------------------------------------------------------------- passkeys


def sample(depth: float, answer: tuple[int, ...]) -> PasskeySample:
    """Filler of zeros, a needle `1 d d d d d` at a depth, the question `2 1`."""
    zeros = round(20 * depth)
    prompt = [0] * zeros + [1, *answer] + [0] * (20 - zeros) + [2, 1]
    return PasskeySample(
        prompt_ids=torch.tensor(prompt),
        answer_ids=torch.tensor(answer),
        question_length=2,
        needle_position=zeros,
        depth=depth,
        length=len(prompt) + 5,
        name="x",
        seed=0,
    )


def test_recall_is_by_greedy_digits_through_the_cache() -> None:
    samples = [sample(0.0, (3, 4, 5, 6, 7)), sample(1.0, (9, 8, 7, 6, 5))]
    model = CopyingModel()
    prompts = retrieval.passkey_prompts(model, samples)
    made: list[FakeCache] = []

    def make(forgets: int) -> FakeCache:
        made.append(FakeCache(forgets=forgets))
        return made[-1]

    assert retrieval.recalled(model, lambda: make(0), prompts) == [True, True]
    assert made[0].steps == [2, 1, 1, 1, 1]  # the question, then digit by digit
    hits = retrieval.recalled(model, lambda: make(3), prompts)
    assert hits == [False, True]
    scores = retrieval.tally([(samples, hits), (samples[1:], [True])])
    low, high = scores.cells
    assert (low.depth, low.correct, low.total, low.recall.estimate) == (0.0, 0, 1, 0.0)
    assert (high.depth, high.correct, high.total) == (1.0, 2, 2)
    assert scores.recall == wilson(2, 3)


def test_one_wrong_digit_is_a_miss() -> None:
    right = sample(0.5, (3, 4, 5, 6, 7))
    prompts = retrieval.passkey_prompts(CopyingModel(), [right])
    answers = prompts.answers.clone()
    answers[0, 4] = 8
    wrong = retrieval.PasskeyPrompts(prompts.samples, prompts.prefix, prompts.questions, answers)
    assert retrieval.recalled(CopyingModel(), FakeCache, wrong) == [False]


def test_passkeys_refuse() -> None:
    short, long = sample(0.0, (3, 4, 5, 6, 7)), sample(2.0, (3, 4, 5, 6, 7))
    with pytest.raises(ValueError, match="one length"):
        retrieval.passkey_prompts(CopyingModel(), [short, long])
    with pytest.raises(ValueError, match="one length"):
        retrieval.passkey_prompts(CopyingModel(), [])
    with pytest.raises(ValueError, match=r"passkey length=33 .* 8 positions"):
        retrieval.passkey_prompts(CopyingModel(positions=8), [short])
    with pytest.raises(ValueError, match="no passkey"):
        retrieval.tally([])


# ---------------------------------------------------------------- attention error


def test_recorded_attention_is_the_models() -> None:
    model, ids = tiny_bytes(), torch.randint(257, (2, 30))
    layers = attention_error.record_attention(model, ids)
    cache = model(ids, use_cache=True).past_key_values
    assert len(layers) == 2
    for x, kept in zip(layers, cache.layers, strict=True):
        torch.testing.assert_close(x.k, kept.keys)
        torch.testing.assert_close(x.v, kept.values)
        scores = x.q @ x.k.repeat_interleave(2, 1).transpose(2, 3) * x.scale
        scores += torch.full((30, 30), -math.inf).triu(1)
        by_hand = scores.softmax(-1) @ x.v.repeat_interleave(2, 1)
        torch.testing.assert_close(x.out, by_hand, atol=1e-5, rtol=1e-4)


def test_attention_that_can_not_be_recorded_is_refused() -> None:
    model = tiny_bytes()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="does not call"):
        attention_error.record_attention(model, torch.randint(257, (1, 8)))


def tiny_mistral() -> MistralForCausalLM:
    torch.manual_seed(2)
    config = MistralConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=24,
        initializer_range=0.15,
    )
    return MistralForCausalLM(config).eval()


def test_attention_under_a_mask_is_not_recorded() -> None:
    with pytest.raises(ValueError, match="only plain causal"):
        attention_error.record_attention(tiny_mistral(), torch.randint(257, (1, 60)))


@pytest.mark.parametrize("make_model", [tiny_bytes, tiny_mistral])
def test_packed_cache_without_loss_scores_as_exact(make_model: Callable[[], Any]) -> None:
    """With a sliding window no exact prefill can be shared; the cache then runs its own."""
    model, texts = make_model(), torch.randint(257, (2, 90))
    exact = decoding.reference(model, texts, prefill=50)
    assert exact.prefix.complete == (make_model is tiny_bytes)
    made: list[KVCache] = []

    def make_cache() -> KVCache:
        made.append(KVCache(model, "full_precision", residual_length=0))
        return made[-1]

    scores = decoding.compare(model, make_cache, exact, chunk=7)
    assert scores.kl.abs().max() < 1e-5
    assert min(made[0].packed_calls) >= 6 and max(made[0].dense_calls) == 0
    assert scores.size == made[0].nbytes() and scores.size.used > 0


class FakeLayer:
    """Attends exactly and scales what it returns."""

    def __init__(self, factor: float) -> None:
        self.factor, self.fed = factor, []

    def prefill(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        self.fed.append(q.shape[2])
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        total, new = self.k.shape[2], q.shape[2]
        mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        out = F.scaled_dot_product_attention(
            q, self.k, self.v, attn_mask=mask, scale=scale, enable_gqa=True
        )
        return out * self.factor


def test_attention_error_by_hand() -> None:
    layers = attention_error.record_attention(tiny_bytes(), torch.randint(257, (2, 30)))
    made: list[FakeLayer] = []

    def make_layer(index: int, x: attention_error.AttentionInputs) -> FakeLayer:
        made.append(FakeLayer((1.0, 1.25)[index]))
        return made[-1]

    exact, scaled = attention_error.attention_errors(layers, make_layer, prefill=10, chunk=8)
    assert exact < 1e-6 and scaled == pytest.approx(0.25, abs=1e-5)
    assert made[0].fed == [8, 8, 4]
    for prefill in (0, 30):
        with pytest.raises(ValueError, match=f"prefill={prefill}"):
            attention_error.attention_errors(layers, make_layer, prefill=prefill)


def test_attention_error_of_real_caches_falls_with_bits() -> None:
    layers = attention_error.record_attention(tiny_bytes(), torch.randint(257, (2, 200)))

    def errors(name: str, **options: int) -> float:
        scheme = KVQuantizer.get(name, residual_length=32, **options)

        def make_layer(index: int, x: attention_error.AttentionInputs) -> attention_error.Layer:
            return scheme.new_layer(
                batch_size=2, num_kv_heads=2, head_dim=32, dtype=x.k.dtype, layer_idx=index
            )

        return max(attention_error.attention_errors(layers, make_layer, prefill=150))

    two, four, eight = (errors("kivi", bits=bits) for bits in (2, 4, 8))
    assert errors("full_precision") < 1e-5 < eight < four / 4 < two / 8


# ---------------------------------------------------------------- ablation


def small_task(**changes: object) -> ablation.Task:
    generator = torch.Generator().manual_seed(4)
    texts = torch.randint(VOCAB, (3, 14), generator=generator)
    samples = (sample(0.0, (3, 4, 5, 6, 7)), sample(0.5, (9, 8, 7, 6, 5)))
    given = {"texts": texts, "prefill": 4, "chunk": 4, "batch_size": 2, "passkeys": (samples,)}
    return ablation.Task(**given | changes)


CANDIDATES = (
    ablation.Candidate("same", FakeCache),
    ablation.Candidate("lossy", lambda: FakeCache(shift=1.0, forgets=1)),
)


def test_ablation_gathers_every_metric() -> None:
    model, task = FakeModel(), small_task(passkeys=())
    done: dict[str, int] = {}

    def on_progress(stage: str, amount: int) -> None:
        done[stage] = done.get(stage, 0) + amount

    result = ablation.ablate(model, CANDIDATES, task, on_progress)
    same, lossy = result.schemes
    assert (same.label, lossy.label) == ("same", "lossy")
    assert same.decode.tokens == 3 * 9 and same.recall is None and same.attention is None
    assert same.decode.perplexity == result.exact_perplexity
    assert same.decode.kl_mean.estimate == 0 and same.decode.top1.estimate == 1
    assert lossy.decode.kl_mean.low > 0.01
    texts = task.texts
    nll = -model.table.log_softmax(-1)[texts[:, 4:-1], texts[:, 5:]]
    assert result.exact_perplexity.estimate == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert sum(done.values()) == task.work(2) and set(done) == {"full precision", "same", "lossy"}
    assert ablation.ablate(model, CANDIDATES, task) == result


def test_ablation_asks_for_passkeys() -> None:
    done: list[int] = []
    model, task = CopyingModel(), small_task(texts=torch.ones(2, 14, dtype=torch.int64))
    result = ablation.ablate(model, CANDIDATES, task, lambda stage, amount: done.append(amount))
    same, lossy = (scores.recall for scores in result.schemes)
    assert same is not None and same.recall.estimate == 1.0
    assert lossy is not None and [c.correct for c in lossy.cells] == [0, 1]
    assert sum(done) == task.work(2)


def test_ablation_compares_attention_where_layers_can_be_made() -> None:
    model, texts = tiny_bytes(), torch.randint(257, (2, 41))
    recorded = tuple(attention_error.record_attention(model, texts[:, :-1]))
    task = ablation.Task(texts, prefill=20, chunk=8, attention=recorded)
    candidates = (
        ablation.Candidate("layers", DynamicCache, lambda i, x: FakeLayer(1.5)),
        ablation.Candidate("none", DynamicCache),
    )
    layers, none = ablation.ablate(model, candidates, task).schemes
    assert layers.attention == pytest.approx((0.5, 0.5), abs=1e-4) and none.attention is None


class BreakingCache(FakeCache):
    """Raises once it holds some tokens, with itself in a cycle of its frames."""

    made: ClassVar[list["weakref.ref[BreakingCache]"]] = []

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error, self.own = error, self
        self.made.append(weakref.ref(self))

    def store(self, ids: Tensor) -> None:
        super().store(ids)
        raise self.error


def breaking(label: str, batch: int, error: type[BaseException]) -> ablation.Candidate:
    """A scheme whose cache of that batch (from 1) raises while it is fed."""
    calls = itertools.count(1)
    return ablation.Candidate(
        label, lambda: BreakingCache(error("full\nhere")) if next(calls) == batch else FakeCache()
    )


@pytest.mark.parametrize("batch", [1, 2, 3])  # two of texts, one of passkeys
def test_a_scheme_that_fails_is_left_out_and_its_cache_freed(batch: int) -> None:
    model, task = CopyingModel(), small_task(texts=torch.ones(3, 14, dtype=torch.int64))
    whole = ablation.ablate(model, CANDIDATES, task)
    BreakingCache.made.clear()
    alive: list[bool] = []

    def on_failure(failure: ablation.Failure) -> None:
        alive.extend(cache() is not None for cache in BreakingCache.made)

    broken = breaking("broken", batch, torch.OutOfMemoryError)
    seen: list[ablation.Ablation] = []
    result = ablation.ablate(
        model,
        (CANDIDATES[0], broken, CANDIDATES[1]),
        task,
        on_failure=on_failure,
        on_result=seen.append,
    )
    assert result.schemes == whole.schemes and result.complete
    assert result.exact_perplexity == whole.exact_perplexity
    assert result.failed == seen[-1].failed == (("broken", "OutOfMemoryError: full\nhere"),)
    assert alive == [False]
    shown = [[s.label for s in so_far.schemes] for so_far in seen]
    assert shown[0] == ["same"] and shown[-1] == ["same", "lossy"]
    assert any("broken" in labels for labels in shown) == (batch > 1)


def test_what_is_known_so_far_is_over_the_same_texts_for_all() -> None:
    model, task = FakeModel(), small_task()
    seen: list[ablation.Ablation] = []
    stopped = (CANDIDATES[0], breaking("stopped", 2, KeyboardInterrupt), CANDIDATES[1])
    with pytest.raises(KeyboardInterrupt):
        ablation.ablate(model, stopped, task, on_result=seen.append)
    first_texts = small_task(texts=task.texts[:2], passkeys=())
    whole = ablation.ablate(model, CANDIDATES, first_texts)
    last = seen[-1]  # "same" has finished the second batch, and is shown over the first
    assert not last.complete and last.exact_perplexity == whole.exact_perplexity
    assert (last.schemes[0], last.schemes[2]) == whole.schemes and not last.failed
    assert [len(so_far.schemes) for so_far in seen] == [1, 2, 3, 3]


def test_an_ablation_in_which_all_fail() -> None:
    seen: list[ablation.Ablation] = []
    candidates = [breaking(label, 1, RuntimeError) for label in "ab"]
    result = ablation.ablate(FakeModel(), candidates, small_task(), on_result=seen.append)
    assert not result.schemes and [failure.label for failure in result.failed] == ["a", "b"]
    assert seen == []


def test_ablation_refuses() -> None:
    with pytest.raises(ValueError, match="labels must be unique"):
        ablation.ablate(FakeModel(), CANDIDATES[:1] * 2, small_task())
    with pytest.raises(ValueError, match="labels must be unique"):
        ablation.ablate(FakeModel(), (), small_task())
    with pytest.raises(ValueError, match="chunk=0"):
        small_task(chunk=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        small_task(batch_size=0)


def test_environment_names_versions_and_machine() -> None:
    here = environments.environment()
    assert here.torch == torch.__version__ and here.accelerator == "none"
    assert here.threads == torch.get_num_threads() and here.processor[0].isdigit()
    assert environments._version("no-such-package-here") == "not installed"
