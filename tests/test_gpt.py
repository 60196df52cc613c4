"""The tiny GPT, which knows nothing of adapters."""

import math

import pytest
import torch
import torch.nn.functional as F

from gpt_mini import GPT, GPTConfig, TokenShift, rotate


def gpt(**options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(11, block_size=12, n_layer=2, n_head=2, n_embd=16, **options))
    for p in model.parameters():
        p.data.mul_(4)  # far from the flat start, so that every token matters
    return model


@pytest.fixture(scope="module")
def model():
    return gpt().eval()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(*shape, seed=0):
    return torch.randint(11, shape, generator=generator(seed))


@pytest.mark.parametrize("t", range(12))
def test_a_token_is_seen_from_its_place_on(model, t):
    idx = tokens(2, 12, seed=t)
    changed = idx.clone()
    changed[0, t] = (changed[0, t] + 1) % 11
    difference = (model(idx)[0] - model(changed)[0]).abs().amax(-1)
    assert difference[0, t] > 1e-2
    assert (difference[0, t:] > 1e-5).all()
    assert (difference[0, :t] < 1e-5).all()
    assert (difference[1] < 1e-5).all()  # another sequence


def test_rotary_scores_depend_on_distance(model):
    q, k = torch.randn(2, 1, 2, 1, 8, generator=generator())
    attention = model.blocks[0].attn

    def turned(x, at):
        return rotate(x, attention.cos[at : at + 1], attention.sin[at : at + 1])

    def score(i, j):
        return (turned(q, i) * turned(k, j)).sum(-1)

    torch.testing.assert_close(score(5, 3), score(9, 7))
    assert not torch.allclose(score(5, 3), score(5, 2), atol=1e-3)
    x = torch.randn(1, 3, 16, generator=generator())
    assert not torch.allclose(attention(x)[:, 2], attention(x[:, [1, 0, 2]])[:, 2], atol=1e-5)


def test_token_shift_mixes_the_previous():
    shift, x = TokenShift(3), torch.arange(6.0).view(1, 2, 3)
    assert torch.equal(shift(x), torch.tensor([[[0.0, 0.5, 1.0], [1.5, 2.5, 3.5]]]))
    shift.mix.data = torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(shift(x)[0, 1], torch.tensor([3.0, 3.25, 2.0]))


def test_loss_is_mean_cross_entropy(model):
    idx, targets = tokens(2, 9), tokens(2, 9, seed=1)
    logits, loss = model(idx, targets)
    assert logits.shape == (2, 9, 11) and model(idx)[1] is None
    by_hand = -F.log_softmax(logits, -1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(loss, by_hand)


def test_a_long_context_is_refused(model):
    with pytest.raises(ValueError, match="at most 12 tokens, got 13"):
        model(tokens(1, 13))


def test_temperature_zero_is_greedy(model):
    out = model.generate(tokens(2, 3), 4, temperature=0)
    for t in range(3, 7):
        assert torch.equal(out[:, t], model(out[:, :t])[0][:, -1].argmax(-1))


@pytest.mark.parametrize("top_k", [None, 1, 3, 20])
def test_samples_have_their_chances(model, top_k):
    idx = tokens(1, 5)
    options = dict(temperature=3.0, top_k=top_k, generator=generator())
    out = model.generate(idx.expand(20000, -1), 1, **options)
    logits = model(idx)[0][0, -1]
    least = logits.topk(min(top_k or 11, 11)).values[-1]
    expected = F.softmax(logits.where(logits >= least, -math.inf) / 3.0, -1)
    shares = out[:, -1].bincount(minlength=11) / 20000
    assert (shares - expected).abs().max() < 0.02  # five standard deviations of a share
    assert not shares[expected == 0].any()


def test_equal_generators_repeat_a_sample(model):
    texts = [model.generate(tokens(2, 3), 8, generator=generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_generate_reads_the_last_tokens(model):
    idx = tokens(1, 20)
    out = model.generate(idx, 3, temperature=0)
    assert out.shape == (1, 23)
    assert torch.equal(out[:, 8:], model.generate(idx[:, 8:], 3, temperature=0))


@pytest.mark.parametrize("training", [True, False])
def test_generate_restores_the_mode(training):
    model = gpt(dropout=0.5).train(training)
    texts = [model.generate(tokens(1, 3), 8, temperature=0) for _ in range(2)]
    assert model.training == training and torch.equal(*texts)
