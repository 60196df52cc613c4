"""smoa.py beside transformers, PEFT and accelerate (tests/requirements-peers.txt).

Where one of them is missing, these tests are skipped.
"""

import copy

import pytest
import torch
from nets import (
    Net,
    adapted,
    all_bits,
    both_sizes,
    dense,
    input_for,
    near,
    normal,
    refused,
    trained_names,
)
from strategies import fill

import smoa

reason = "pip install -r tests/requirements-peers.txt"
t = pytest.importorskip("transformers", reason=reason)
peft = pytest.importorskip("peft", reason=reason)
accelerate = pytest.importorskip("accelerate", reason=reason)
t.logging.set_verbosity_error()
t.logging.disable_progress_bar()

TOKENS = torch.randint(2, 32, (4, 8), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0, 1])
TINY = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
TEXT = dict(vocab_size=32, bos_token_id=0, eos_token_id=1, pad_token_id=0)

LM = dict(input_ids=TOKENS, labels=TOKENS)
MODELS = {  # (class, configuration, targets, inputs)
    "GPT-2": (
        t.GPT2LMHeadModel,
        t.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **TEXT),
        ["c_attn", "c_fc", "mlp.c_proj"],
        LM,
    ),
    "Llama": (
        t.LlamaForCausalLM,
        t.LlamaConfig(num_key_value_heads=1, **TINY, **TEXT),
        ["q_proj", "v_proj", "up_proj", "down_proj"],
        LM,
    ),
    "BERT": (
        t.BertForSequenceClassification,
        t.BertConfig(**TINY, **TEXT),
        ["query", "value", "intermediate.dense"],
        dict(input_ids=TOKENS, labels=LABELS),
    ),
    "ViT": (
        t.ViTForImageClassification,
        t.ViTConfig(image_size=8, patch_size=4, **TINY),
        ["q_proj", "v_proj", "fc1"],
        dict(pixel_values=normal(4, 3, 8, 8, seed=0), labels=LABELS),
    ),
    "T5": (
        t.T5ForConditionalGeneration,
        t.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **TEXT),
        ["q", "v", "wi", "wo"],
        dict(input_ids=TOKENS, decoder_input_ids=TOKENS, labels=TOKENS),
    ),
}


def make(name):
    kind, config, *_ = MODELS[name]
    torch.manual_seed(0)
    return kind(copy.deepcopy(config)).eval()


def llama(**options):
    model = make("Llama")
    smoa.inject(model, MODELS["Llama"][2], **({"rank": 4} | options))
    return model


# ------------------------------------------------------------------------------------------------
# transformers


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_has_every_w(name, tmp_path):
    _, _, targets, inputs = MODELS[name]
    model, plain, fresh = make(name), make(name), make(name)
    before = plain(**inputs)
    names = smoa.inject(model, targets, rank=4)
    assert len(names) >= 4
    assert torch.equal(model(**inputs).loss, before.loss)

    factors = [p for p in fill(model).parameters() if p.requires_grad]
    weights = {f"{name}.weight": dense(layer) for name, layer in smoa.adapters(model)}
    expected, y = torch.func.functional_call(plain, weights, (), inputs), model(**inputs)
    assert near(y.logits, expected.logits) and not near(y.logits, before.logits)
    found = torch.cat([g.flatten() for g in torch.autograd.grad(y.loss, factors)])
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(expected.loss, factors)])
    assert near(found, exact)

    smoa.save(model, tmp_path / "adapter.pt")
    assert smoa.load(fresh, tmp_path / "adapter.pt") == names
    assert torch.equal(fresh(**inputs).logits, y.logits)
    smoa.merge(fresh)
    with refused("merged", "unload(model, merge=True)", model=fresh, error=RuntimeError):
        fresh.save_pretrained(tmp_path)
    smoa.unload(fresh, merge=True).save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path).eval()
    assert near(again(**inputs).logits, y.logits)
    assert all_bits(smoa.unload(model).state_dict()) == all_bits(plain.state_dict())


def trainer(model, folder, **options):
    arguments = t.TrainingArguments(
        folder,
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    data = [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS]
    return t.Trainer(model, arguments, train_dataset=data, eval_dataset=data)


def test_a_resumed_trainer_ends_where_it_would(tmp_path):
    whole, resumed = llama(dropout=0.1), llama(dropout=0.1, order="natural")
    trainer(whole, tmp_path / "whole").train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"  # which brings the spectral orders
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=checkpoint)
    assert all_bits(resumed.state_dict()) == all_bits(whole.state_dict())
    assert all(B_k.any() for _, layer in smoa.adapters(whole) for B_k in layer.B)
    assert trained_names(whole) == trained_names(llama())
    assert all_bits(smoa.unload(whole).state_dict()) == all_bits(make("Llama").state_dict())


def test_a_trainer_loads_its_best_model(tmp_path):
    model = llama()
    best = dict(load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    run = trainer(model, tmp_path, eval_strategy="steps", eval_steps=2, **best)
    run.train()  # the loss falls, so that the greatest is the first
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-6)
    assert run.state.best_metric > run.state.log_history[-3]["eval_loss"]


# ------------------------------------------------------------------------------------------------
# PEFT

PEFT = {  # (configuration, the same corner of SMoA)
    "lora": (peft.LoraConfig(r=4, lora_alpha=8), dict(modulate=False, alpha=8)),
    "hira": (peft.HiraConfig(r=4), dict(modulate=True)),
}


@both_sizes
@pytest.mark.parametrize("corner", PEFT)
def test_a_corner_is_what_peft_has(corner, size):
    config, options = PEFT[corner]
    config = copy.deepcopy(config)
    config.target_modules = ["first"]
    model = adapted(size, targets=["first"], num_blocks=1, **options)
    other = peft.inject_adapter_in_model(config, Net(size))
    layer, twin = model.first, other.first
    with torch.no_grad():
        for side in "AB":
            p = getattr(twin, f"{corner}_{side}")["default"]
            getattr(p, "weight", p).copy_(getattr(layer, side)[0])
    x = input_for(model)
    assert near(model(x), other(x))


@pytest.mark.parametrize("config", [peft.LoraConfig, peft.HiraConfig])
def test_a_layer_of_peft_is_refused(config):
    model = peft.inject_adapter_in_model(config(target_modules=["first"]), Net())
    with refused("first: peft.tuners.", "another adapter", model=model):
        smoa.inject(model, ["first"])


# ------------------------------------------------------------------------------------------------
# accelerate: weights that are there only while their module is called


def offload(model, **options):
    return accelerate.cpu_offload(model, execution_device="cpu", **options)


@both_sizes
def test_offloading_is_right_or_an_error(size):
    model, x = offload(Net(size)), input_for(Net(size))
    with refused("first: ", "offloading", model=model):
        smoa.inject(model, ["first"])

    model = offload(adapted(size))
    for verb in (smoa.merge, smoa.state_dict, lambda model: model(x)):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            verb(model)

    model = adapted(size)
    y = model(x)
    assert torch.equal(offload(adapted(size), preload_module_classes=["SMoALinear"])(x), y)
    smoa.merge(model)
    with pytest.raises(RuntimeError, match="merged"):
        offload(model)
    assert near(offload(smoa.unload(model, merge=True))(x), y)
