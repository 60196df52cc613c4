"""The tiny GPT, which knows nothing of adapters."""

import pytest
import torch
import torch.nn.functional as F

import smoa
from gpt_mini import GPT, GPTConfig, TokenShift, rotate

CONFIG = dict(vocab_size=11, block_size=12, n_layer=2, n_head=2, n_embd=16)
CLOSE = dict(rtol=0, atol=1e-5)  # float32, logits of order 10


def gpt(**options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**CONFIG | options))
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


@pytest.mark.parametrize("t", range(1, 12))
def test_later_tokens_are_not_seen(model, t):
    idx = tokens(2, 12, seed=t)
    changed = idx.clone()
    changed[:, t:] = (changed[:, t:] + 1) % 11
    here, there = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(here[:, :t], there[:, :t], **CLOSE)
    assert not torch.allclose(here[:, t], there[:, t], atol=1e-2)


def test_earlier_tokens_are_seen(model):
    idx = tokens(1, 12)
    changed = torch.cat(((idx[:, :1] + 1) % 11, idx[:, 1:]), dim=1)
    assert ((model(idx)[0] - model(changed)[0]).abs().amax(-1) > 1e-5).all()


def test_sequences_of_a_batch_are_apart(model):
    idx = tokens(3, 7)
    torch.testing.assert_close(model(idx)[0][1:2], model(idx[1:2])[0], **CLOSE)


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


def test_dropout_acts_in_training_only():
    block, x = gpt(dropout=0.5).blocks[0], torch.randn(1, 5, 16)
    for part in (block.attn, block.mlp):
        assert not torch.equal(part(x), part(x))
        part.eval()
        assert torch.equal(part(x), part(x))


def test_embedding_and_head_are_one(model):
    V, L, C = 11, 2, 16
    block = 12 * C * C + 4 * C  # qkv, proj, fc, proj; two norms and two shifts
    assert model.head.weight is model.embed.weight
    assert sum(p.numel() for p in model.parameters()) == V * C + L * block + C


def test_every_parameter_gets_a_gradient():
    model = gpt()
    model(tokens(4, 12), tokens(4, 12, seed=1))[1].backward()
    assert all(p.grad.any() for p in model.parameters())


def test_smoa_is_injected_from_outside():
    model, idx = gpt().eval(), tokens(2, 12)
    before = model(idx)[0]
    assert len(smoa.inject(model, ["qkv", "proj", "fc"], rank=4, num_blocks=2)) == 8
    torch.testing.assert_close(model(idx)[0], before)
    for _, layer in smoa.adapters(model):
        for B_k in layer.B:
            torch.nn.init.normal_(B_k)
    changed = model(idx)[0]
    assert not torch.allclose(changed, before, atol=1e-3)
    smoa.merge(model)
    torch.testing.assert_close(model(idx)[0], changed, rtol=1e-4, atol=1e-4)
    smoa.unload(model)
    assert torch.equal(model(idx)[0], before)


def test_top_k_samples_all_of_the_k(model):
    idx = tokens(1, 5)
    for k in (1, 3, 11, 20):
        out = model.generate(
            idx.expand(400, -1), 1, top_k=k, temperature=9.0, generator=generator()
        )
        likeliest = model(idx)[0][0, -1].topk(min(k, 11)).indices
        assert set(out[:, -1].tolist()) == set(likeliest.tolist())
        assert torch.equal(out[:, :5], idx.expand(400, -1))


def test_temperature_zero_is_greedy(model):
    out = model.generate(tokens(2, 3), 4, temperature=0)
    for t in range(3, 7):
        assert torch.equal(out[:, t], model(out[:, :t])[0][:, -1].argmax(-1))


def test_temperature_divides_the_logits(model):
    idx = tokens(1, 5)
    out = model.generate(idx.expand(20000, -1), 1, temperature=3.0, generator=generator())
    expected = F.softmax(model(idx)[0][0, -1] / 3.0, -1)
    shares = out[:, -1].bincount(minlength=11) / 20000
    assert (shares - expected).abs().max() < 0.02  # five standard deviations of a share


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
