"""SMoA beside other people's tools: accelerate, transformers and PEFT.

They are in tests/requirements-peers.txt. Where one is missing, its tests are skipped.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from strategies import (
    Net,
    X,
    adapted,
    all_bits,
    bits,
    fill,
    generator,
    names_of_factors,
    normal,
    refused,
    same_orders,
    trained_names,
)
from torch import nn

import smoa


def peer(name):
    reason = f"{name} is missing: pip install -r tests/requirements-peers.txt"
    return pytest.importorskip(name, reason=reason)


@pytest.fixture
def accelerate():
    return peer("accelerate")


@pytest.fixture
def transformers():
    package = peer("transformers")
    package.logging.set_verbosity_error()
    package.logging.disable_progress_bar()
    return package


@pytest.fixture
def peft():
    return peer("peft")


# --------------------------------------------------------------------------------------------------
# accelerate: weights that are there only while their module is called


@pytest.fixture(params=["cpu", "disk"])
def offload(request, accelerate, tmp_path):
    """A function that offloads a model to where the test says."""

    def to_cpu(model, **options):
        return accelerate.cpu_offload(model, execution_device="cpu", **options)

    def to_disk(model, **options):
        return accelerate.disk_offload(model, tmp_path, execution_device="cpu", **options)

    return {"cpu": to_cpu, "disk": to_disk}[request.param]


each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@each_dtype
def test_a_model_offloaded_after_injection_is_refused_when_called(offload, dtype):
    model = offload(adapted(dtype=dtype))
    with pytest.raises(RuntimeError, match=r"not at hand.* smoa\.unload\(model, merge=True\)"):
        model(X.to(dtype))


@pytest.mark.parametrize("part", ["first", "second.base"])
def test_an_adapted_model_of_which_a_part_is_offloaded_is_refused_when_called(offload, part):
    model = adapted()
    offload(model.get_submodule(part))
    with pytest.raises(RuntimeError, match="not at hand"):
        model(X)


def test_offloading_another_layer_than_the_adapted_ones_changes_nothing(offload):
    model = adapted()
    expected = model(X)
    offload(model.head)
    assert torch.equal(model(X), expected)


@each_dtype
def test_layers_that_are_offloaded_as_a_whole_compute_as_before(offload, dtype):
    model = adapted(dtype=dtype)
    expected = model(X.to(dtype))
    offloaded = offload(model, preload_module_classes=["SMoALinear"])
    assert torch.equal(offloaded(X.to(dtype)), expected)


def test_a_merged_model_cannot_be_offloaded(offload):
    model = adapted()
    smoa.merge(model)
    merged = bits(model.first.base.weight)
    with pytest.raises(RuntimeError, match=r"merged.* smoa\.unload\(model, merge=True\)"):
        offload(model)
    assert bits(model.first.base.weight) == merged


@pytest.mark.parametrize("merge", [True, False])
def test_an_unloaded_model_can_be_offloaded(offload, merge):
    model = smoa.unload(adapted(), merge=merge)
    expected = model(X)
    assert torch.equal(offload(model)(X), expected)


REFUSED_WHILE_OFFLOADED = {
    "state_dict": lambda model, path: smoa.state_dict(model),
    "load_state_dict": lambda model, path: smoa.load_state_dict(model, smoa.state_dict(adapted())),
    "save": lambda model, path: smoa.save(model, path / "new"),
    "load": lambda model, path: smoa.load(model, path / "adapter"),
    "merge": lambda model, path: smoa.merge(model),
    "unload": lambda model, path: smoa.unload(model, merge=True),
    "inject": lambda model, path: smoa.inject(model, ["head"]),
}


@pytest.mark.parametrize("verb", REFUSED_WHILE_OFFLOADED)
def test_a_verb_that_needs_the_weights_is_refused_while_they_are_offloaded(offload, tmp_path, verb):
    smoa.save(adapted(), tmp_path / "adapter")
    model = offload(adapted())
    with refused(ValueError, "meta device", model=model):
        REFUSED_WHILE_OFFLOADED[verb](model, tmp_path)
    assert not (tmp_path / "new").exists()


def test_an_offloaded_plain_model_takes_no_adapter(offload):
    model = offload(Net())
    with refused(ValueError, "first: ", "meta device", model=model):
        smoa.inject(model, ["first"])


def test_a_model_brought_back_from_offloading_works_as_before(accelerate, offload, tmp_path):
    model = adapted()
    expected = model(X)
    model = offload(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(model(X), expected)
    smoa.save(model, tmp_path / "adapter")
    plain = Net()
    smoa.load(plain, tmp_path / "adapter")
    assert torch.equal(plain(X), expected)


def test_a_model_without_values_takes_no_adapter(accelerate):
    with accelerate.init_empty_weights():
        model = nn.Sequential(nn.Linear(4, 4))
    with refused(ValueError, "0: ", "meta device", "load or initialise", model=model):
        smoa.inject(model, ["0"])


def test_a_state_saved_by_accelerator_is_trained_on_as_if_never_left(accelerate, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step():
        accelerator.backward(model(X).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    step()
    accelerator.save_state(tmp_path)
    step()
    expected = smoa.state_dict(copy.deepcopy(model))
    accelerator.load_state(tmp_path)
    step()
    assert all_bits(smoa.state_dict(model)) == all_bits(expected)


# --------------------------------------------------------------------------------------------------
# transformers

WIDTHS = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=32,
    bos_token_id=0,
    eos_token_id=1,
)
TOKENS = torch.randint(32, (4, 8), generator=generator(0))


def llama(transformers, tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**WIDTHS, tie_word_embeddings=tied)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def gpt2(transformers, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        vocab_size=32,
        bos_token_id=0,
        eos_token_id=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


LLAMA_LAYERS = ["q_proj", "v_proj", "up_proj", "down_proj"]
GPT2_LAYERS = ["c_attn", "c_fc", "mlp.c_proj"]  # Conv1D, which keeps its weight as (in, out)

MODELS = {
    "llama": (llama, LLAMA_LAYERS, torch.float32),
    "llama bfloat16": (llama, LLAMA_LAYERS, torch.bfloat16),
    "gpt2": (gpt2, GPT2_LAYERS, torch.float32),
    "gpt2 bfloat16": (gpt2, GPT2_LAYERS, torch.bfloat16),
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def loss(model):
    return model(input_ids=TOKENS, labels=TOKENS).loss


def trained(model, steps=2):
    """Trained at so high a rate that two steps can be seen in bfloat16."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.3)
    for _ in range(steps):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("make, targets, dtype", MODELS.values(), ids=list(MODELS))
def test_the_life_of_an_adapter_in_a_model_of_transformers(
    transformers, tmp_path, make, targets, dtype
):
    model, fresh, plain = (make(transformers, dtype=dtype).eval() for _ in range(3))
    weights = all_bits(plain.state_dict())

    names = smoa.inject(model, targets, rank=4)
    assert len(names) == 2 * len(targets)
    assert torch.equal(logits(model), logits(plain))

    before = loss(model)
    trained(model)
    assert loss(model) < before
    y = logits(model)

    smoa.save(model, tmp_path / "adapter")
    assert smoa.load(fresh, tmp_path / "adapter") == names
    assert torch.equal(logits(fresh), y)

    smoa.merge(model)
    change = (y - logits(plain)).norm()
    rounding = 1e-4 if dtype == torch.float32 else 0.1  # a merged weight is rounded to its dtype
    assert (logits(model) - y).norm() < rounding * change

    smoa.unmerge(model)
    assert torch.equal(logits(model), y)
    assert all_bits(smoa.unload(model).state_dict()) == weights


@pytest.mark.parametrize("make, targets, dtype", MODELS.values(), ids=list(MODELS))
def test_a_model_adapted_for_good_is_saved_and_read_as_a_plain_one(
    transformers, tmp_path, make, targets, dtype
):
    model = make(transformers, dtype=dtype).eval()
    smoa.inject(model, targets, rank=4)
    smoa.unload(fill(model), merge=True).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_conv1d_is_adapted_as_the_linear_layer_that_it_is(transformers):
    conv = gpt2(transformers).transformer.h[0].mlp.c_fc
    linear = nn.Linear(16, 64)
    linear.weight.data = conv.weight.detach().T.contiguous()
    linear.bias.data = conv.bias.detach().clone()
    x = normal(3, 16, seed=0, dtype=torch.float32)
    outputs = []
    for base in (conv, linear):
        layer = fill(smoa.SMoALinear(base, rank=4))
        assert (layer.out_features, layer.in_features) == (64, 16)
        outputs.append(layer(x))
    torch.testing.assert_close(*outputs)


# ---- tied heads

TIED = {
    "llama": (lambda transformers: llama(transformers, tied=True), "model.embed_tokens.weight"),
    "gpt2": (gpt2, "transformer.wte.weight"),
}
each_tied = pytest.mark.parametrize("make, embedding", TIED.values(), ids=list(TIED))


@each_tied
def test_a_tied_head_is_refused_with_the_names_of_both_owners(transformers, make, embedding):
    model = make(transformers)
    with refused(ValueError, embedding, "lm_head.weight", "tie_weights", model=model):
        smoa.inject(model, ["lm_head"])


def test_an_adapter_of_an_untied_head_is_refused_by_a_tied_one(transformers, tmp_path):
    untied, tied = llama(transformers), llama(transformers, tied=True)
    smoa.inject(untied, ["lm_head"], rank=4)
    smoa.save(untied, tmp_path / "adapter")
    with refused(ValueError, "lm_head.weight", "tie_weights", model=tied):
        smoa.load(tied, tmp_path / "adapter", check_base=False)


@each_tied
def test_a_tied_head_among_the_targets_leaves_the_others_plain(transformers, make, embedding):
    model = make(transformers)
    with refused(ValueError, embedding, "lm_head.weight", model=model):
        smoa.inject(model, r".*(proj|c_attn|lm_head)")


def test_a_head_tied_by_the_embedding_does_not_keep_other_layers_from_being_adapted(
    transformers, tmp_path
):
    model = llama(transformers, tied=True)
    smoa.inject(model, ["q_proj"])
    fill(model)
    y = logits(model)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), y)
    model.save_pretrained(tmp_path)
    smoa.merge(model)
    torch.testing.assert_close(logits(model), y)


def test_an_untied_head_is_adapted(transformers, tmp_path):
    model = llama(transformers)
    assert smoa.inject(model, ["lm_head"]) == ["lm_head"]
    fill(model)
    hidden = model.model(input_ids=TOKENS).last_hidden_state
    head = model.lm_head
    torch.testing.assert_close(
        logits(model), hidden @ (head.base.weight + head.delta_weight()).T.detach()
    )
    y = logits(model)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), y)


def test_a_merged_model_has_no_checkpoint_of_its_own(transformers, tmp_path):
    model = llama(transformers)
    smoa.inject(model, ["q_proj"])
    smoa.merge(fill(model))
    with refused(RuntimeError, "merged", "smoa.unload(model, merge=True)", model=model):
        model.save_pretrained(tmp_path)


# ---- training and generating


def trainer(transformers, model, folder, **options):
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        logging_strategy="no",
        **options,
    )
    data = [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS]
    return transformers.Trainer(model, arguments, train_dataset=data)


def for_trainer(transformers, **layer_options):
    model = llama(transformers)
    smoa.inject(model, LLAMA_LAYERS, rank=4, dropout=0.1, **layer_options)
    return model


def test_a_resumed_trainer_comes_out_where_an_uninterrupted_one_does(
    transformers, accelerate, tmp_path
):
    whole = for_trainer(transformers)
    trainer(transformers, whole, tmp_path / "whole").train()
    resumed = for_trainer(transformers, order="natural")  # the checkpoint brings the spectral one
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    trainer(transformers, resumed, tmp_path / "resumed").train(resume_from_checkpoint=checkpoint)
    assert all_bits(resumed.state_dict()) == all_bits(whole.state_dict())
    for (_, layer), (_, twin) in zip(smoa.adapters(whole), smoa.adapters(resumed)):
        assert same_orders((twin.row_order, twin.col_order), (layer.row_order, layer.col_order))
    for _, layer in smoa.adapters(whole):
        assert all(B_k.any() for B_k in layer.B)


def test_trainer_trains_the_factors_alone(transformers, accelerate, tmp_path):
    model, plain = for_trainer(transformers), llama(transformers)
    trainer(transformers, model, tmp_path).train()
    assert trained_names(model) == names_of_factors(model)
    assert all_bits(smoa.unload(model).state_dict()) == all_bits(plain.state_dict())


def gradients(model):
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("use_reentrant", [True, False])
@each_dtype
def test_gradient_checkpointing_changes_no_gradient(transformers, way, use_reentrant, dtype):
    model = llama(transformers, dtype=dtype).train()
    smoa.inject(model, LLAMA_LAYERS, rank=4)
    fill(model)
    expected = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert model.is_activation_checkpointing
    assert all_bits(gradients(model)) == all_bits(expected)


def test_a_merged_model_generates_what_the_adapted_one_does(transformers):
    model = llama(transformers).eval()
    smoa.inject(model, LLAMA_LAYERS, rank=4)
    fill(model)

    def generated():
        mask = torch.ones_like(TOKENS)
        options = dict(max_new_tokens=6, do_sample=False, pad_token_id=1)
        return model.generate(TOKENS, attention_mask=mask, **options)

    expected = generated()
    smoa.merge(model)
    assert torch.equal(generated(), expected)


# --------------------------------------------------------------------------------------------------
# PEFT


def peft_configs(peft):
    return {
        "lora": peft.LoraConfig(target_modules=["first"]),
        "ia3": peft.IA3Config(target_modules=["first"], feedforward_modules=[]),
        "oft": peft.OFTConfig(target_modules=["first"], oft_block_size=2),
    }


@pytest.mark.parametrize("method", ["lora", "ia3", "oft"])
def test_a_layer_of_peft_is_refused_as_another_adapter_s(peft, method):
    model = peft.inject_adapter_in_model(peft_configs(peft)[method], Net())
    with refused(TypeError, "first: ", "base_layer", "take that adapter out first", model=model):
        smoa.inject(model, ["first"])


def test_a_layer_beside_peft_s_is_adapted(peft):
    config = peft.LoraConfig(target_modules=["first"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, Net())
    y = model(X)
    smoa.inject(model, ["second"], rank=4)
    assert torch.equal(model(X), y)
    fill(model)
    hidden = torch.tanh(torch.tanh(model.first(X)) @ model.second.weight.T)
    torch.testing.assert_close(model(X), model.head(hidden))


def test_the_layer_inside_peft_s_is_refused(peft):
    config = peft.LoraConfig(target_modules=["first"])
    model = peft.inject_adapter_in_model(config, Net())
    with refused(ValueError, "first.base_layer: ", "take that adapter out first", model=model):
        smoa.inject(model, ["first.base_layer"])


def test_once_peft_s_adapter_is_taken_out_its_layer_is_adapted(peft, transformers):
    model = llama(transformers)
    y = logits(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="take that adapter out first"):
        smoa.inject(wrapped, ["q_proj"])
    plain = wrapped.unload()
    names = smoa.inject(plain, ["q_proj"])
    assert names == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert torch.equal(logits(plain), y)


def test_peft_refuses_an_adapted_layer(peft):
    model = adapted(["first"])
    with pytest.raises(ValueError, match="SMoALinear"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["first"]), model)


def test_an_adapter_of_peft_put_inside_the_layer_adds_to_it(peft):
    model = adapted(["first"])
    layer = model.first
    config = peft.LoraConfig(target_modules=["first.base"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    lora = layer.base.get_delta_weight("default")
    W = layer.base.base_layer.weight + lora + layer.delta_weight()
    torch.testing.assert_close(layer(X), F.linear(X, W, layer.bias))
    with pytest.raises(ValueError, match="first: .* another adapter"):
        smoa.merge(model)
