"""The tiny GPT and its training, which know nothing of adapters."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import fill, generator, seeds

import gpt_mini
import smoa
from gpt_mini import GPT, GPTConfig, Recipe, batch, evaluate, learning_rate, rotate, train_steps

CONFIG = GPTConfig(vocab_size=11, block_size=12, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(CONFIG)
    for p in model.parameters():
        p.data.mul_(4)  # far from the flat start, so that every token matters
    return model.eval()


def tokens(*shape, seed=0):
    return torch.randint(CONFIG.vocab_size, shape, generator=generator(seed))


@given(st.integers(1, 3), st.integers(1, 12))
def test_logits_have_a_row_a_token_and_a_column_a_character(model, B, T):
    logits, loss = model(tokens(B, T))
    assert logits.shape == (B, T, 11) and loss is None


@given(st.integers(1, 11), seeds)
def test_a_later_token_never_changes_an_earlier_logit(model, t, seed):
    idx = tokens(2, 12, seed=seed)
    changed = idx.clone()
    changed[:, t:] = (changed[:, t:] + 1) % 11
    here, there = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(
        here[:, :t], there[:, :t], rtol=0, atol=1e-5
    )  # float32, logits of order 10
    assert not torch.allclose(here[:, t], there[:, t], atol=1e-2)


@given(seeds)
def test_an_earlier_token_changes_every_later_logit(model, seed):
    idx = tokens(1, 12, seed=seed)
    changed = torch.cat(((idx[:, :1] + 1) % 11, idx[:, 1:]), dim=1)
    assert ((model(idx)[0] - model(changed)[0]).abs().amax(-1) > 1e-5).all()


def test_a_sequence_of_a_batch_does_not_see_the_others(model):
    idx = tokens(3, 7)
    torch.testing.assert_close(model(idx)[0][1:2], model(idx[1:2])[0], rtol=0, atol=1e-5)


def test_attention_sees_how_far_away_a_token_is_and_not_where_both_are(model):
    q, k = torch.randn(2, 1, 2, 1, 8, generator=generator(0))
    attention = model.blocks[0].attn

    def score(i, j):
        turned = [
            rotate(t, attention.cos[at : at + 1], attention.sin[at : at + 1])
            for t, at in ((q, i), (k, j))
        ]
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(score(5, 3), score(9, 7))
    assert not torch.allclose(score(5, 3), score(5, 2), atol=1e-3)


@given(seeds, st.data())
def test_loss_is_the_mean_cross_entropy_of_the_targets_that_are_given(model, seed, data):
    idx, targets = tokens(2, 9, seed=seed), tokens(2, 9, seed=seed + 1)
    ignored = torch.tensor(
        data.draw(
            st.lists(st.booleans(), min_size=18, max_size=18).filter(lambda drawn: not all(drawn))
        )
    ).view(2, 9)
    logits, loss = model(idx, targets.masked_fill(ignored, -1))
    losses = -F.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(loss, losses[~ignored].mean())


def test_a_context_that_is_too_long_is_refused(model):
    with pytest.raises(ValueError, match="at most 12 tokens, got 13"):
        model(tokens(1, 13))


def test_channels_that_do_not_split_into_pairs_a_head_are_refused():
    with pytest.raises(ValueError, match="n_embd=18 must be a multiple of 2 n_head=8"):
        GPTConfig(vocab_size=11, n_embd=18, n_head=4)


def test_parameters_are_as_many_as_the_formula_says(model):
    V, L, C = CONFIG.vocab_size, CONFIG.n_layer, CONFIG.n_embd
    block = (
        3 * C * C + C * C + 4 * C * C + 4 * C * C + 4 * C
    )  # qkv, proj, fc, proj; two norms and two shifts
    assert (
        sum(p.numel() for p in model.parameters()) == V * C + L * block + C
    )  # embedding and head are one


def test_embedding_and_head_are_tied(model):
    assert model.head.weight is model.embed.weight


@given(st.integers(1, 11), seeds)
def test_top_k_samples_among_the_k_likeliest(model, k, seed):
    idx = tokens(2, 5, seed=seed)
    out = model.generate(idx, 1, top_k=k, temperature=5.0, generator=generator(seed))
    likeliest = model(idx)[0][:, -1].topk(k).indices
    assert torch.equal(out[:, :5], idx) and all(
        token in row for token, row in zip(out[:, 5], likeliest)
    )


def test_top_k_samples_each_of_the_k(model):
    idx = tokens(1, 5).expand(400, -1)
    logits = model(idx[:1])[0][0, -1].detach()
    out = model.generate(
        idx, 1, top_k=3, temperature=float(logits.std()) * 10, generator=generator(0)
    )
    assert set(out[:, -1].tolist()) == set(logits.topk(3).indices.tolist())


@given(seeds)
def test_temperature_zero_takes_the_likeliest_token(model, seed):
    idx = tokens(2, 3, seed=seed)
    out = model.generate(idx, 4, temperature=0)
    for t in range(3, 7):
        assert torch.equal(out[:, t], model(out[:, :t])[0][:, -1].argmax(-1))


def test_temperature_divides_the_logits(model):
    idx = tokens(1, 5).expand(20000, -1)
    out = model.generate(idx, 1, temperature=3.0, generator=generator(0))
    expected = F.softmax(model(idx[:1])[0][0, -1] / 3.0, -1)
    shares = out[:, -1].bincount(minlength=11) / 20000
    assert (
        shares - expected
    ).abs().max() < 0.02  # five standard deviations of a share of 20,000 draws


@given(seeds)
def test_the_same_generator_gives_the_same_text(model, seed):
    texts = [
        model.generate(tokens(2, 3), 8, generator=generator(s)) for s in (seed, seed, seed + 1)
    ]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_generate_goes_past_the_block_size_and_reads_the_last_tokens(model):
    idx = tokens(1, 20)
    out = model.generate(idx, 3, temperature=0)
    assert out.shape == (1, 23) and torch.equal(
        out, torch.cat((idx[:, :8], model.generate(idx[:, 8:], 3, temperature=0)), dim=1)
    )


def test_generate_leaves_the_mode_as_it_was(model):
    torch.manual_seed(0)
    dropped = GPT(
        GPTConfig(vocab_size=11, block_size=12, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    )
    for training in (True, False):
        texts = [dropped.train(training).generate(tokens(1, 3), 8, temperature=0) for _ in range(3)]
        assert (
            dropped.training == training
            and torch.equal(texts[0], texts[1])
            and torch.equal(texts[0], texts[2])
        )


@pytest.mark.parametrize(
    "bad",
    [dict(temperature=-1), dict(top_k=0), dict(idx=torch.empty(1, 0, dtype=torch.int64))],
    ids=str,
)
def test_generate_refuses_what_it_cannot_sample(model, bad):
    with pytest.raises(ValueError, match="temperature >= 0, top_k >= 1 and at least one token"):
        model.generate(**(dict(idx=tokens(1, 3), max_new_tokens=1) | bad))


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    dropped = GPT(
        GPTConfig(vocab_size=11, block_size=12, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    )
    idx = tokens(1, 5)
    assert not torch.equal(dropped(idx)[0], dropped(idx)[0])
    dropped.eval()
    assert torch.equal(dropped(idx)[0], dropped(idx)[0])


def test_every_parameter_receives_a_gradient():
    torch.manual_seed(0)
    fresh = GPT(CONFIG)
    fresh(tokens(4, 12), tokens(4, 12, seed=1))[1].backward()
    assert all(p.grad.any() for p in fresh.parameters())


def test_smoa_reaches_the_gpt_by_inject_alone():
    torch.manual_seed(0)
    adapted, idx = GPT(CONFIG).eval(), tokens(2, 12)
    before = adapted(idx)[0]
    assert (
        len(smoa.inject(adapted, ["qkv", "proj", "fc"], rank=4, num_blocks=2)) == 4 * CONFIG.n_layer
    )
    assert torch.equal(adapted(idx)[0], before)
    changed = fill(adapted)(idx)[0]
    smoa.merge(adapted)
    torch.testing.assert_close(adapted(idx)[0], changed, rtol=1e-4, atol=1e-4)
    smoa.unload(adapted)
    assert torch.equal(adapted(idx)[0], before)


# ---- Its training --------------------------------------------------------------------------------


def tiny():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=7, block_size=8, n_layer=1, n_head=2, n_embd=16))


TEXT = torch.randint(7, (400,), generator=generator(0))
RECIPE = Recipe(steps=10, batch_size=4, lr=1e-3)


def test_a_step_is_taken_for_each_loss_that_is_asked_for():
    model = tiny()
    start = model.embed.weight.clone()
    losses = train_steps(model, TEXT, RECIPE)
    assert torch.equal(model.embed.weight, start)
    idx, targets = batch(TEXT, 8, 4, RECIPE.seed, 0)
    assert next(losses) == pytest.approx(tiny()(idx, targets)[1].item())
    assert not torch.equal(model.embed.weight, start)
    assert len([*losses]) == 9


def test_gradients_from_elsewhere_do_not_count():
    losses = []
    for foreign in (False, True):
        model = tiny()
        if foreign:
            model(TEXT[None, :8], TEXT[None, 1:9])[1].backward()
        losses.append(list(train_steps(model, TEXT, RECIPE)))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("length", [0, 1, 8])
def test_a_text_shorter_than_a_window_is_refused(length):
    for call in (evaluate, lambda *arguments: next(train_steps(*arguments, RECIPE))):
        with pytest.raises(ValueError, match=f"need more than 8 tokens, a window's, got {length}"):
            call(tiny(), TEXT[:length])
    assert evaluate(tiny(), TEXT[:9]) > 0


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        next(train_steps(tiny().requires_grad_(False), TEXT, RECIPE))


def test_what_is_frozen_does_not_train():
    model = tiny()
    model.blocks.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    list(train_steps(model, TEXT, RECIPE))
    for was, p in zip(before, model.parameters()):
        assert torch.equal(was, p) == (not p.requires_grad)


def test_a_loss_that_is_not_finite_ends_training_and_evaluation():
    model = tiny()
    steps = train_steps(model, TEXT, Recipe(steps=10, batch_size=4, lr=1e30))
    with pytest.raises(FloatingPointError, match="the loss is (nan|inf) at step 2"):
        list(steps)
    model.norm.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the loss on held-out text is nan"):
        evaluate(model, TEXT)


def test_batches_depend_on_seed_and_step_alone():
    tokens = torch.arange(1000)
    idx, targets = batch(tokens, 8, 4, seed=1, step=2)
    assert torch.equal(idx[:, 1:], targets[:, :-1]) and idx.shape == (4, 8)
    assert torch.equal(batch(tokens, 8, 4, seed=1, step=2)[0], idx)
    assert not torch.equal(batch(tokens, 8, 4, seed=1, step=3)[0], idx)


def test_evaluation_is_the_mean_loss_of_every_character_that_has_a_context():
    model, tokens = tiny(), torch.randint(7, (41,))
    pairs = [(tokens[i : i + 8], tokens[i + 1 : i + 9]) for i in range(0, 40, 8)]
    by_hand = [model(idx[None], targets[None])[1].item() for idx, targets in pairs]
    assert evaluate(model, tokens) == pytest.approx(sum(by_hand) / 5, abs=1e-5)
    assert model.training


def test_the_rate_rises_over_a_twentieth_and_falls_to_zero():
    rates = [learning_rate(step, 100, 2.0) for step in range(101)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0]) and max(rates) == 2.0
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[100] == pytest.approx(0)


def test_a_card_that_cannot_compute_is_passed_over_for_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # and is not there
    assert gpt_mini.choose_device() == torch.device("cpu")


def test_training_under_bf16_autocast_stays_close_to_float32(monkeypatch):
    losses = []
    for on in (False, True):
        bfloat16 = torch.autocast("cpu", torch.bfloat16, enabled=on)
        monkeypatch.setattr(gpt_mini, "autocast", lambda device, context=bfloat16: context)
        model = tiny()
        smoa.inject(model, ["qkv", "proj", "fc"], rank=4, num_blocks=2)
        losses.append([*train_steps(model, TEXT, RECIPE), evaluate(model, TEXT)])
    assert losses[0] != losses[1]
    assert torch.allclose(*map(torch.tensor, losses), atol=0.02)  # bfloat16 has 8 bits
