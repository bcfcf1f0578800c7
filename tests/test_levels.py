"""Levels of a non-uniform format from a model and a text, weighted by what the loss depends on."""

import json

import pytest
import torch
import torch.nn.functional as F
from tiny_models import MODELS, VOCABULARY
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

from kivi import KVQuantizer
from kivi.__main__ import app
from kivi.cli_levels import write_levels
from kivi.cli_model import open_model
from kivi.codebooks import levels
from kivi.evals.feeding import text_windows
from kivi.evals.sensitivity import record_sensitivity
from kivi.hf_rope import find_rope
from kivi.quantize import dequantize, quantize
from kivi.transforms import turn


class Nudge(TorchFunctionMode):
    """Adds to one element of the keys or values of the second layer."""

    def __init__(self, name, place, amount):
        super().__init__()
        self.name, self.place, self.amount, self.calls = name, place, amount, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            if self.calls == 2:
                x = args[{"key": 1, "value": 2}[self.name]].clone()
                x[self.place] += self.amount
                args = tuple(x if a.shape == x.shape and i == {"key": 1, "value": 2}[self.name]
                             else a for i, a in enumerate(args))  # fmt: skip
        return func(*args, **(kwargs or {}))


def test_a_gradient_is_what_a_nudge_does_to_the_loss():
    config, made, options = MODELS["llama"]
    torch.manual_seed(0)
    model = made(config(**options)).eval().double()
    ids = torch.randint(2, VOCABULARY, (1, 12))
    second = record_sensitivity(model, ids)[1]
    assert second.k.shape == second.k_gradient.shape == second.v.shape

    def loss(name, place, amount):
        with torch.no_grad(), Nudge(name, place, amount):
            logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[0, :-1].double(), ids[0, 1:])

    for name, gradient in (("key", second.k_gradient), ("value", second.v_gradient)):
        place = (0, 1, 3, 5)
        slope = (loss(name, place, 0.1) - loss(name, place, -0.1)) / 0.2
        torch.testing.assert_close(gradient[place], slope, rtol=1e-2, atol=0)


def test_models_that_cannot_tell_are_refused():
    config, made, options = MODELS["llama"]
    model = made(config(**options)).eval()
    ids = torch.ones(1, 12, dtype=torch.int64)
    with pytest.raises(ValueError, match="its weights take no gradient"):
        record_sensitivity(model.requires_grad_(False), ids)
    model.requires_grad_(True).set_attn_implementation("eager")
    with pytest.raises(ValueError, match="does not call scaled_dot_product_attention"):
        record_sensitivity(model, ids)


def test_levels_are_weighted_means():
    torch.manual_seed(0)
    places, weights = torch.rand(50_000) ** 2, torch.rand(50_000)
    found = torch.tensor(levels(places, weights, 4))
    codes = (places[:, None] - found).abs().argmin(1)
    for i in range(4):
        mine = codes == i
        mean = (places[mine] * weights[mine]).sum() / weights[mine].sum()
        assert abs(mean - found[i]) < 1e-3
    one = levels(torch.zeros(4), torch.ones(4), 4)  # where there is nothing, levels stay apart
    assert 0 < one[0] < one[1] < one[2] < one[3] < 1


def test_a_file_of_levels_leaves_less_that_matters(tmp_path):
    loaded = open_model("embedded", "cpu", "auto")
    tokens, _ = loaded.text_tokens(None)
    ids = text_windows(tokens, count=1, length=385, bos=loaded.tokenizer.bos_token_id)
    file = tmp_path / "levels.json"
    options = ["--scheme", "kvquant", "--bits", "2", "--context", "385", "--out", str(file)]
    result = CliRunner().invoke(app, ["tune", *options])
    assert result.exit_code == 0, result.output
    document = json.loads(file.read_text())
    assert [len(document[name]) for name in ("key", "value")] == [6, 6]
    plain, tuned = (KVQuantizer.get("kvquant", bits=2, **o) for o in ({}, {"file": str(file)}))
    position = torch.arange(1, 385)
    for i, x in enumerate(record_sensitivity(loaded.model, ids)):
        rope = find_rope(loaded.model, i)
        keys, slope = (turn(t[:, :, 1:], position, rope, back=True) for t in (x.k, x.k_gradient))
        for name, exact, gradient in (
            ("key", keys, slope),
            ("value", x.v[:, :, 1:], x.v_gradient[:, :, 1:]),
        ):
            error = []
            for scheme in (plain, tuned):
                back = dequantize(quantize(exact, getattr(scheme.spec(i), name)))
                error.append(((back - exact) * gradient).square().sum())
            assert error[1] < error[0]
    with pytest.raises(ValueError, match="context=100 is not allowed; it must be >= 129"):
        write_levels(file, loaded, ids[:, :100], 2)
    with pytest.raises(ValueError, match="bits=5 is not allowed"):
        write_levels(file, loaded, ids, 5)
