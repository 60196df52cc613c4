"""What is written to a file, what is refused when it is read, what travels in a model's state."""

import contextlib
import copy
import hashlib
import io
import os
import pickle
import resource
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import (
    HALVES,
    Net,
    X,
    adapted,
    all_bits,
    bits,
    fill,
    names_of_factors,
    normal,
    options,
    refused,
    same_orders,
    snapshot,
    trained_names,
)
from torch import nn
from torch.nn.utils import prune

import smoa

# tmp_path is one folder for all examples: each of them writes its own file.
reuses_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def model_options(draw):
    """Options that both layers of `adapted()` take, (8, 6) and (5, 8)."""
    num_blocks = draw(st.integers(1, 4))
    return draw(options(5, 6, num_blocks=num_blocks, order="spectral"))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "adapter.pt"


def input_for(model):
    return X.to(next(model.parameters()).dtype)


@contextlib.contextmanager
def refused_by(model, *words, error=ValueError):
    """A block that raises one error with all the words in it, and leaves the model as it was."""
    y = model(input_for(model))
    with refused(error, *words, model=model):
        yield
    assert torch.equal(model(input_for(model)), y)


# --------------------------------------------------------------------------------------------------
# There and back


@reuses_a_folder
@given(layer_options=model_options(), merged=st.booleans())
def test_loaded_adapter_gives_the_same_outputs(file, layer_options, merged):
    model, fresh = adapted(**layer_options), Net()
    expected = model(X)
    if merged:
        smoa.merge(model)
    smoa.save(model, file)
    assert smoa.load(fresh, file) == ["first", "second"]
    assert torch.equal(fresh(X), expected)
    assert not fresh.first.merged


@reuses_a_folder
@given(layer_options=model_options())
def test_loaded_adapter_has_the_same_configuration(file, layer_options):
    model, fresh = adapted(**layer_options), Net()
    smoa.save(model, file)
    smoa.load(fresh, file)
    for (_, loaded), (_, saved) in zip(smoa.adapters(fresh), smoa.adapters(model)):
        assert str(loaded) == str(saved)
        assert loaded.scale == saved.scale
        assert loaded.branch_ranks == saved.branch_ranks


@reuses_a_folder
@given(layer_options=model_options())
def test_state_dict_of_the_adapter_goes_there_and_back(file, layer_options):
    model, other = adapted(**layer_options), adapted(fill_seed=9, **layer_options)
    smoa.load_state_dict(other, smoa.state_dict(model))
    assert torch.equal(other(X), model(X))
    assert all_bits(smoa.state_dict(other)) == all_bits(smoa.state_dict(model))


def gradients(model):
    model(X).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_loaded_adapter_goes_on_training_as_the_saved_one_would(file):
    model, fresh = adapted(), Net()
    smoa.save(model, file)
    smoa.load(fresh, file)
    expected = gradients(model)
    assert expected
    assert all_bits(gradients(fresh)) == all_bits(expected)


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES])
@pytest.mark.parametrize("from_dtype", [torch.float32, torch.bfloat16])
def test_adapter_loads_onto_the_base_in_another_floating_dtype(file, from_dtype, dtype):
    model = adapted(dtype=from_dtype, fill_seed=5)
    base = Net(dtype=from_dtype).to(dtype)
    smoa.save(model, file)
    smoa.load(base, file)
    y, expected = base(X.to(dtype)), model(X.to(from_dtype))
    eps = max(torch.finfo(dtype).eps, torch.finfo(from_dtype).eps)
    # Weights, inputs and two hidden layers are rounded in either dtype, then amplified by a slope
    # of about 10 from input to output.
    torch.testing.assert_close(y.double(), expected.double(), rtol=0, atol=20 * eps)


def on_another_machine(weight, right=smoa.spectral_order):
    """Another order of the same weight, as close positions sort elsewhere."""
    rows, cols = right(weight)
    return rows.flip(0), cols.flip(0)


def orders_of(model):
    return [(layer.row_order, layer.col_order) for _, layer in smoa.adapters(model)]


def test_order_travels_with_the_adapter(file, monkeypatch):
    model = adapted()
    smoa.save(model, file)
    monkeypatch.setattr(smoa, "spectral_order", on_another_machine)
    loaded, injected = Net(), adapted(fill_seed=4)
    assert not same_orders(orders_of(injected)[0], orders_of(model)[0])
    smoa.load(loaded, file)
    smoa.load_state_dict(injected, smoa.state_dict(model))
    for other in (loaded, injected):
        assert all(map(same_orders, orders_of(other), orders_of(model)))
        assert torch.equal(other(X), model(X))


def test_order_travels_onto_an_adapter_of_the_same_configuration(file, monkeypatch):
    model = adapted()
    smoa.save(model, file)
    monkeypatch.setattr(smoa, "spectral_order", on_another_machine)
    injected = adapted(fill_seed=4)
    smoa.load(injected, file)
    assert all(map(same_orders, orders_of(injected), orders_of(model)))
    assert torch.equal(injected(X), model(X))


def test_order_travels_in_the_state_dict_of_the_model(monkeypatch):
    model = adapted()
    monkeypatch.setattr(smoa, "spectral_order", on_another_machine)
    injected = adapted(fill_seed=4)
    injected.load_state_dict(model.state_dict())
    assert all(map(same_orders, orders_of(injected), orders_of(model)))
    assert torch.equal(injected(X), model(X))


def test_order_given_by_hand_travels_too(file):
    order = torch.arange(8).flip(0), torch.tensor([1, 0, 3, 2, 5, 4])
    model, fresh = adapted(["first"], order=order), Net()
    smoa.save(model, file)
    smoa.load(fresh, file)
    assert same_orders(orders_of(fresh)[0], order)
    assert torch.equal(fresh(X), model(X))


def test_an_order_given_by_hand_is_copied():
    rows, cols = torch.arange(5), torch.arange(8)
    layer = smoa.SMoALinear(nn.Linear(8, 5), rank=2, order=(rows, cols))
    rows.copy_(rows.flip(0))
    assert layer.row_order.tolist() == [0, 1, 2, 3, 4]


def test_factors_that_a_layer_shares_are_saved_under_both_names(file):
    model, fresh = adapted(), Net()
    model.first.A_1 = model.first.A_0
    smoa.save(model, file)
    smoa.load(fresh, file)
    assert torch.equal(fresh(X), model(X))


def test_state_does_not_depend_on_the_default_device():
    model = adapted()
    expected = smoa.state_dict(model)
    with torch.device("meta"):
        state = smoa.state_dict(model)
    assert all_bits(state) == all_bits(expected)


def test_load_computes_no_spectrum(file, monkeypatch):
    model, fresh = adapted(), Net()
    smoa.save(model, file)
    monkeypatch.setattr(smoa, "spectral_order", None)
    monkeypatch.setattr(torch.linalg, "svd", None)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    smoa.load(fresh, file)
    assert torch.equal(fresh(X), model(X))


def orders_as_saved(layer):
    return torch.cat([layer.row_order, layer.col_order]).int()


def test_state_dict_of_the_adapter_holds_factors_orders_and_a_sketch():
    model = adapted(rank=1)  # block 1 has no branch
    state = smoa.state_dict(model)
    for name in ("first", "second"):
        layer = model.get_submodule(name)
        assert bits(state.pop(f"{name}.A_0")) == bits(layer.A[0])
        assert bits(state.pop(f"{name}.B_0")) == bits(layer.B[0])
        assert bits(state.pop(f"{name}.order")) == bits(orders_as_saved(layer))
        assert state.pop(f"{name}.base_sketch").shape == (1025,)
    assert not state


def test_state_dict_of_the_adapter_holds_the_live_factors():
    model = adapted()
    state = smoa.state_dict(model)
    fill(model, seed=9)
    assert bits(state["first.A_0"]) == bits(model.first.A[0])
    assert bits(state["first.B_1"]) == bits(model.first.B[1])


def test_a_natural_order_is_not_saved():
    model = adapted(order="natural")
    assert not [key for key in smoa.state_dict(model) if key.endswith("order")]


@pytest.mark.parametrize("order", ["natural", "spectral"])
def test_a_state_of_the_natural_order_fits_an_adapter_of_any(order):
    model, other = adapted(order="natural"), adapted(fill_seed=9, order=order)
    smoa.load_state_dict(other, smoa.state_dict(model))
    assert all(map(same_orders, orders_of(other), orders_of(model)))
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("merged", [False, True])
def test_full_state_dict_fits_a_freshly_injected_model(merged):
    model, fresh = adapted(), adapted(seed=50, fill_seed=9)
    if merged:
        smoa.merge(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model(X))
    assert not fresh.first.merged
    smoa.unload(fresh)
    assert all_bits(fresh.state_dict()) == all_bits(Net().state_dict())


def test_the_orders_are_extra_state_of_the_module_and_no_buffers():
    model = adapted()
    state = model.state_dict()
    assert bits(state["first._extra_state"]) == bits(orders_as_saved(model.first))
    assert not dict(model.named_buffers())
    assert not [key for key in state if "row_order" in key or "col_order" in key]


def test_a_full_state_dict_whose_order_is_no_permutation_is_refused():
    model, state = adapted(), adapted().state_dict()
    state["second._extra_state"] = torch.zeros(13, dtype=torch.int32)
    before = orders_as_saved(model.second)
    with pytest.raises((RuntimeError, ValueError), match="permutation"):
        model.load_state_dict(state)
    assert torch.equal(orders_as_saved(model.second), before)


@pytest.mark.parametrize("which", ["first", "second"])
def test_the_full_state_dict_of_a_merged_model_is_refused(which):
    model = adapted()
    model.get_submodule(which).merge()
    words = ["merged", "unmerge", "unload(model, merge=True)"]
    with refused_by(model, *words, error=RuntimeError):
        model.state_dict()


def test_a_merged_layer_has_no_full_state_dict_even_alone():
    layer = fill(smoa.SMoALinear(Net().first, rank=2))
    layer.merge()
    with refused(RuntimeError, "merged", "unmerge", model=layer):
        layer.state_dict()


def test_the_adapter_of_a_merged_model_has_the_state_that_it_had():
    model = adapted()
    before = all_bits(smoa.state_dict(model))
    smoa.merge(model)
    assert all_bits(smoa.state_dict(model)) == before


def test_a_merged_model_that_went_through_the_meta_device_takes_a_state_dict():
    model, other = adapted(), adapted(fill_seed=9)
    smoa.merge(other)
    other.to("meta").to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))
    assert not other.first.merged


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_has_the_same_outputs_and_a_life_of_its_own(duplicate, merged):
    model = adapted()
    if merged:
        smoa.merge(model)
    before, y = snapshot(model), model(X)
    twin = duplicate(model)
    assert torch.equal(twin(X), y)
    assert twin.first.merged == merged
    smoa.unmerge(twin)
    assert bits(twin.first.base.weight) == bits(Net().first.weight)
    smoa.unload(fill(twin, 9), merge=True)
    assert snapshot(model) == before
    assert torch.equal(model(X), y)


# --------------------------------------------------------------------------------------------------
# One module under two names


def two_names(seed=0):
    torch.manual_seed(seed)
    shared = nn.Linear(4, 4)
    return nn.ModuleDict({"a": shared, "b": shared})


def test_two_names_of_one_module_get_one_adapter(file):
    model, fresh, x = two_names(), two_names(), torch.eye(4)
    assert smoa.inject(model, ["a"], rank=2) == ["a"]
    assert model["a"] is model["b"]
    smoa.save(fill(model), file)
    smoa.load(fresh, file)
    assert fresh["a"] is fresh["b"]
    assert torch.equal(fresh["b"](x), model["b"](x))


def test_a_module_of_two_names_shares_its_weight_with_nobody_else():
    model = two_names()
    smoa.inject(model, ["a"], rank=2)
    smoa.merge(model)
    plain = smoa.unload(model)
    assert type(plain["a"]) is nn.Linear
    assert plain["a"] is plain["b"]


@pytest.mark.parametrize("targets", [["a"], ["b"], ["a", "b"], "a|b", "b"], ids=repr)
def test_either_name_of_a_shared_module_can_be_a_target(targets):
    model = two_names()
    smoa.inject(model, targets, rank=2)
    assert model["a"] is model["b"]
    assert len(list(smoa.adapters(model))) == 1


@pytest.mark.parametrize("target, why", [("b", "adapted already"), ("b.base", "named a, b")])
def test_a_shared_module_cannot_be_adapted_twice_under_its_other_name(target, why):
    model = two_names()
    smoa.inject(model, ["a"], rank=2)
    with refused(ValueError, why, model=model):
        smoa.inject(model, [target], rank=2)


def test_a_lone_layer_can_be_saved_and_loaded_in_memory():
    layer = fill(smoa.SMoALinear(Net().first, rank=2), seed=1)
    other = fill(smoa.SMoALinear(Net().first, rank=2), seed=2)
    smoa.load_state_dict(other, smoa.state_dict(layer))
    assert torch.equal(other(X), layer(X))


# --------------------------------------------------------------------------------------------------
# Another base


def difference(W, kind):
    if kind == "scale":
        return W
    E = torch.zeros_like(W)
    if kind == "everywhere":
        E.copy_(normal(*W.shape, seed=8))
    elif kind == "one row":
        E[2] = normal(W.shape[1], seed=8)
    elif kind == "one column":
        E[:, 4] = 1
    elif kind == "one entry":
        E[1, 3] = 1
    return E


def perturbed(W, kind, share):
    """W and a difference of that kind, of a share of its Frobenius norm."""
    E = difference(W, kind)
    return W + E * (share * W.norm() / E.norm())


def swapped(W, dim):
    order = torch.arange(W.shape[dim])
    order[[0, 3]] = order[[3, 0]]
    return W.index_select(dim, order)


OTHER_BASES = {
    "re-initialised": lambda W: normal(*W.shape, seed=99),
    "two rows swapped": lambda W: swapped(W, 0),
    "two columns swapped": lambda W: swapped(W, 1),
    "of the other sign": lambda W: -W,
    "zero": torch.zeros_like,
    "1 % changed, everywhere": lambda W: perturbed(W, "everywhere", 0.01),
    "1 % changed, one row": lambda W: perturbed(W, "one row", 0.01),
    "1 % changed, one column": lambda W: perturbed(W, "one column", 0.01),
    "1 % changed, one entry": lambda W: perturbed(W, "one entry", 0.01),
    "1 % changed, scale": lambda W: perturbed(W, "scale", 0.01),
}


@pytest.mark.parametrize("width", [8, 300])
@pytest.mark.parametrize("change", OTHER_BASES.values(), ids=OTHER_BASES)
def test_wrong_base_raises_without_mutation(file, change, width):
    model, other = adapted(width=width), Net(width)
    W = other.second.weight.data
    W.copy_(change(W))
    smoa.save(model, file)
    with refused_by(other, "second", "another base weight", "check_base=False"):
        smoa.load(other, file)
    assert smoa.load(other, file, check_base=False) == ["first", "second"]
    assert all(map(torch.equal, other.second.A, model.second.A))


@pytest.mark.parametrize("share", [1e-3, 1e-5])
@pytest.mark.parametrize("kind", ["everywhere", "one row", "one column", "scale"])
def test_a_base_that_rounding_could_have_changed_is_accepted(file, kind, share):
    model, other = adapted(width=300), Net(300)
    W = other.second.weight.data
    W.copy_(perturbed(W, kind, share))
    smoa.save(model, file)
    assert smoa.load(other, file) == ["first", "second"]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("rank", [4, 6], ids=["same configuration", "another"])
def test_wrong_base_leaves_the_adapter_that_was_there(file, merged, rank):
    smoa.save(adapted(seed=50, fill_seed=1, rank=4), file)
    model = adapted(fill_seed=2, rank=rank)
    model.second.A[0].requires_grad_(False)
    if merged:
        smoa.merge(model)
    with refused_by(model, "first", "another base weight"):
        smoa.load(model, file)


def test_base_of_the_adapter_is_the_unmerged_one(file):
    model, fresh, already_merged = adapted(), Net(), adapted()
    smoa.unload(already_merged, merge=True)
    smoa.merge(model)
    smoa.save(model, file)
    smoa.load(fresh, file)
    with refused_by(already_merged, "first", "another base weight"):
        smoa.load(already_merged, file)


# --------------------------------------------------------------------------------------------------
# Other shapes, other layers


def test_other_shapes_are_refused(file):
    smoa.save(adapted(width=10), file)
    model = Net()
    with refused_by(model, "first.B_0", "(5, 2)", "(4, 2)"):
        smoa.load(model, file)


def test_layers_that_the_model_has_not_are_refused(file):
    smoa.save(adapted(["first", "head"]), file)
    model = nn.Sequential()
    model.add_module("first", Net().first)
    with refused_by(model, "head"):
        smoa.load(model, file)


def test_a_name_that_is_no_linear_layer_here_is_refused(file):
    smoa.save(adapted(["first", "head"]), file)
    model = Net()
    model.head = nn.LayerNorm(5)
    with refused_by(model, "head", "linear layer", error=TypeError):
        smoa.load(model, file)


OTHER_SKETCH = smoa.state_dict(adapted(seed=50))["second.base_sketch"]
NO_ORDER = torch.zeros(5 + 8, dtype=torch.int32)
STATE_FAULTS = {
    "missing": ("second.B_1", None, ["second.B_1"]),
    "unexpected": ("head.A_0", torch.ones(1, 1), ["head.A_0"]),
    "another rank": ("second.A_0", torch.ones(3, 4), ["second.A_0", "(3, 4)", "(2, 4)"]),
    "no permutation": ("second.order", NO_ORDER, ["second.order", "permutation of 0..4"]),
    "of another base": ("second.base_sketch", OTHER_SKETCH, ["second", "another base weight"]),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("key, value, words", STATE_FAULTS.values(), ids=STATE_FAULTS)
def test_state_that_does_not_fit_is_refused(key, value, words, merged):
    model, state = adapted(fill_seed=2), smoa.state_dict(adapted(fill_seed=1))
    state[key] = value
    if value is None:
        del state[key]
    if merged:
        smoa.merge(model)
    with refused_by(model, *words):
        smoa.load_state_dict(model, state)


def test_a_refused_load_does_not_merge_again_what_was_changed_after_the_merge():
    model = adapted()
    smoa.merge(model)
    fill(model, seed=9)
    with refused_by(model, "missing"):
        smoa.load_state_dict(model, {})


def test_state_for_a_model_without_an_adapter_is_refused():
    model, state = Net(), smoa.state_dict(adapted())
    with refused_by(model, "first.A_0", "unexpected"):
        smoa.load_state_dict(model, state)


def test_a_model_without_an_adapter_is_not_saved(file):
    model = Net()
    with refused_by(model, "no adapter", "inject"):
        smoa.save(model, file)
    assert not file.exists()


# --------------------------------------------------------------------------------------------------
# Reading: anything but a whole adapter file is refused


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):  # what unpickling would call
        return Path.touch, (self.mark,)


def written(content, zipped=True):
    """What torch.save writes of it, in its format of today or in the older one."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def sealed(body):
    """The body of a file with the checksum that `load` looks for."""
    return body + hashlib.sha256(body).digest()


# From a payload and a good file, files that run code in a reader that unpickles.
INFECTED = {
    "bare": lambda payload, good: pickle.dumps(payload),
    "zipped": lambda payload, good: written({"config": {}, "state": payload}),
    "zipped, sealed": lambda payload, good: sealed(written({"config": {}, "state": payload})),
    "older": lambda payload, good: written({"config": {}, "state": payload}, zipped=False),
    "older, sealed": lambda payload, good: sealed(
        written({"config": {}, "state": payload}, zipped=False)
    ),
    "after a good file": lambda payload, good: good + pickle.dumps(payload),
    "before the checksum": lambda payload, good: good[:-32] + pickle.dumps(payload) + good[-32:],
}


@pytest.mark.parametrize("infect", INFECTED.values(), ids=INFECTED)
def test_a_file_with_a_pickled_object_is_refused_and_runs_nothing(file, tmp_path, infect):
    smoa.save(adapted(), file)
    mark, model = tmp_path / "the payload ran", Net()
    file.write_bytes(infect(Payload(mark), file.read_bytes()))
    with refused_by(model, str(file)):
        smoa.load(model, file)
    assert not mark.exists()


def test_the_payload_would_have_run(tmp_path):
    mark = tmp_path / "the payload ran"
    pickled(Payload(mark))
    assert mark.exists()


@reuses_a_folder
@given(share=st.floats(0, 1, exclude_max=True), merged=st.booleans())
def test_a_truncated_file_is_refused(file, share, merged):
    smoa.save(adapted(), file)
    content, model = file.read_bytes(), adapted(fill_seed=2)
    file.write_bytes(content[: int(share * len(content))])
    if merged:
        smoa.merge(model)
    with refused_by(model, str(file), "damaged"):
        smoa.load(model, file)


@reuses_a_folder
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_refused(file, share, bit):
    smoa.save(adapted(["second"], rank=2), file)
    content, model = bytearray(file.read_bytes()), Net()
    content[int(share * len(content))] ^= 1 << bit
    file.write_bytes(content)
    with refused_by(model, str(file), "damaged"):
        smoa.load(model, file)


def test_the_older_format_which_can_hide_code_from_older_torch_is_refused(file):
    smoa.save(adapted(), file)
    content, model = torch.load(io.BytesIO(file.read_bytes()), weights_only=True), Net()
    file.write_bytes(sealed(written(content, zipped=False)))
    with refused_by(model, str(file), "no SMoA adapter"):
        smoa.load(model, file)


NO_ZIP_FILES = [
    b"",
    b"\0" * 8,
    b"\xff" * 64,
    b"\2" + b"\0" * 7 + b"{}",
    b"hello, world",
    b"{}",
    b"PK",
]


@pytest.mark.parametrize("content", NO_ZIP_FILES)
def test_a_file_of_something_else_is_refused(file, content):
    file.write_bytes(content)
    model = Net()
    with refused_by(model, str(file), "no SMoA adapter"):
        smoa.load(model, file)


NO_ADAPTERS = [
    {},
    {"config": {}},
    {"config": {}, "state": {"A": 1}},
    [1],
    {"config": {}, "state": []},
]


@pytest.mark.parametrize("content", NO_ADAPTERS, ids=repr)
def test_a_whole_file_of_another_content_is_refused(file, content):
    file.write_bytes(sealed(written(content)))
    model = Net()
    with refused_by(model, str(file), "no SMoA adapter"):
        smoa.load(model, file)


def test_a_file_that_is_not_there_is_an_oserror(file):
    model = Net()
    with refused_by(model, file.name, error=FileNotFoundError):
        smoa.load(model, file)


# --------------------------------------------------------------------------------------------------
# Writing: whole or not at all


def test_the_file_is_what_torch_save_writes_and_a_checksum_after_it(file):
    model = adapted()
    smoa.save(model, file)
    content = file.read_bytes()
    assert content == sealed(content[:-32])
    saved = torch.load(io.BytesIO(content[:-32]), weights_only=True)
    assert saved.keys() == {"config", "state"}
    assert saved["config"].keys() == {"first", "second"}
    assert saved["config"]["first"]["rank"] == saved["config"]["second"]["rank"] == 4
    assert all_bits(saved["state"]) == all_bits(smoa.state_dict(model))


def test_save_replaces_an_old_file_under_its_readers_and_leaves_no_other(file):
    smoa.save(adapted(fill_seed=1), file)
    old = file.read_bytes()
    with file.open("rb") as reader:
        smoa.save(adapted(fill_seed=2), file)
        assert reader.read() == old
    assert file.read_bytes() != old
    assert list(file.parent.iterdir()) == [file]


@contextlib.contextmanager
def full_disk(size):
    """No file can be longer than that many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [0, 100, 4096])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(file, size):
    smoa.save(adapted(fill_seed=1), file)
    old, model = file.read_bytes(), adapted(fill_seed=2)
    with pytest.raises(OSError, match="too large"), full_disk(size):
        smoa.save(model, file)
    assert file.read_bytes() == old
    assert list(file.parent.iterdir()) == [file]


NEW_OR_OLD = pytest.mark.parametrize("old", [None, b"old"], ids=["new", "old"])


@NEW_OR_OLD
def test_write_whole_writes_the_bytes(file, old):
    if old is not None:
        file.write_bytes(old)
    smoa.write_whole(file, b"some bytes")
    smoa.write_whole(str(file), b"other bytes")
    assert file.read_bytes() == b"other bytes"
    assert list(file.parent.iterdir()) == [file]


def test_write_whole_takes_a_path_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smoa.write_whole("adapter.pt", b"new")
    assert Path("adapter.pt").read_bytes() == b"new"


@NEW_OR_OLD
def test_a_write_that_fails_is_reported_under_the_given_path(file, old):
    if old is not None:
        file.write_bytes(old)
    with pytest.raises(OSError, match="too large") as caught, full_disk(100):
        smoa.write_whole(file, bytes(1000))
    assert caught.value.filename == str(file)
    assert [path.read_bytes() for path in file.parent.iterdir()] == ([] if old is None else [old])


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o664])
def test_a_rewritten_file_keeps_its_mode(file, permissions):
    file.write_bytes(b"old")
    file.chmod(permissions)
    smoa.save(adapted(), file)
    assert mode(file) == permissions


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="root alone can give files")
def test_a_file_that_root_rewrites_keeps_its_owner(file):
    file.write_bytes(b"old")
    os.chown(file, 1234, 4321)
    smoa.write_whole(file, b"new")
    assert (file.stat().st_uid, file.stat().st_gid) == (1234, 4321)


def test_a_new_file_has_the_mode_of_any_new_file(file, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"")
    smoa.save(adapted(), file)
    assert mode(file) == mode(other)


@NEW_OR_OLD
def test_a_symbolic_link_is_followed_and_kept(file, tmp_path, old):
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "target"
    if old is not None:
        target.write_bytes(old)
    file.symlink_to(Path("folder", "target"))
    smoa.write_whole(file, b"new")
    assert file.is_symlink()
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


def test_links_that_lead_round_in_a_circle_are_left_as_they_are(file, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(file)
    file.symlink_to(other)
    with pytest.raises(OSError):
        smoa.write_whole(file, b"new")
    assert file.is_symlink() and other.is_symlink()


def read_from(path, content):
    content.append(path.read_bytes())


def test_a_named_pipe_is_written_through(file):
    os.mkfifo(file)
    content = []
    reader = threading.Thread(target=read_from, args=(file, content), daemon=True)
    reader.start()
    smoa.write_whole(file, b"through the pipe")
    reader.join(timeout=10)
    assert content == [b"through the pipe"]
    assert file.is_fifo()


def test_a_pipe_without_a_name_is_written_through():
    read_end, write_end = os.pipe()
    smoa.write_whole(f"/dev/fd/{write_end}", b"through the pipe")  # as a shell's >(command)
    os.close(write_end)
    with open(read_end, "rb") as reader:
        assert reader.read() == b"through the pipe"


def test_a_device_is_written_through(file):
    file.symlink_to(os.devnull)
    smoa.save(adapted(), file)
    assert Path(os.devnull).is_char_device()
    assert file.is_symlink()


def test_a_missing_folder_is_reported_under_the_given_path(tmp_path):
    path = tmp_path / "missing" / "adapter.pt"
    with pytest.raises(FileNotFoundError) as caught:
        smoa.save(adapted(), path)
    assert caught.value.filename == str(path)
    assert str(path) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(IsADirectoryError) as caught:
        smoa.save(adapted(), tmp_path)
    assert caught.value.filename == str(tmp_path)
    assert not list(tmp_path.iterdir())


def test_save_changes_nothing_in_the_model(file):
    model = adapted()
    for verb in (smoa.merge, smoa.unmerge):
        verb(model)
        before = snapshot(model)
        smoa.save(model, file)
        assert snapshot(model) == before


def test_the_same_adapter_gives_the_same_file_merged_or_not(file):
    model = adapted()
    smoa.save(model, file)
    content = file.read_bytes()
    smoa.merge(model)
    smoa.save(model, file)
    assert file.read_bytes() == content


# --------------------------------------------------------------------------------------------------
# Swapping


ADAPTERS = {
    "the same configuration": {},
    "another rank": {"rank": 7, "num_blocks": 3},
    "other targets": {"targets": ["second", "head"]},
    "fewer targets": {"targets": ["head"], "rank": 2},
    "other switches": {"modulate": False, "alpha": 3, "dropout": 0.25, "branch_ranks": [0, 4]},
    "another order": {"order": "natural"},
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("other", ADAPTERS.values(), ids=ADAPTERS)
def test_swapping_adapters_leaves_no_trace_of_the_one_before(tmp_path, other, merged):
    A, B = tmp_path / "A", tmp_path / "B"
    of_A, of_B = adapted(fill_seed=1).eval(), adapted(fill_seed=2, **other).eval()
    smoa.save(of_A, A)
    smoa.save(of_B, B)
    model, again = Net().eval(), Net().eval()
    for path, expected in ((A, of_A(X)), (B, of_B(X)), (A, of_A(X))):
        smoa.load(model, path)
        assert torch.equal(model(X), expected)
        if merged:
            smoa.merge(model)
    smoa.unmerge(model)
    smoa.load(again, A)
    swapped_in, loaded = snapshot(model), snapshot(again)
    for what in ("parameters", "buffers", "trained", "types", "training", "rows", "cols"):
        assert swapped_in[what] == loaded[what]
    smoa.unload(model)
    assert all_bits(model.state_dict()) == all_bits(Net().state_dict())


def parameters_of(model):
    return {id(p) for p in model.parameters()}


def test_an_optimizer_keeps_its_hold_over_load_state_dict():
    source, model = adapted(fill_seed=1), adapted(fill_seed=2)
    held = parameters_of(model)
    smoa.load_state_dict(model, smoa.state_dict(source))
    assert parameters_of(model) == held
    assert torch.equal(model(X), source(X))


def test_load_builds_new_layers_over_the_same_bases(file):
    smoa.save(adapted(fill_seed=1), file)
    model = adapted(fill_seed=2)
    layer, base = model.first, model.first.base
    smoa.load(model, file)
    assert model.first is not layer
    assert model.first.base is base
    assert not parameters_of(model) & {id(p) for p in (*layer.A, *layer.B)}


@pytest.mark.parametrize("before", [None, {}, {"rank": 6}], ids=["plain", "same", "another"])
def test_after_a_load_as_after_inject_only_the_factors_train(file, before):
    smoa.save(adapted(), file)
    model = Net() if before is None else adapted(**before)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    smoa.load(model, file)
    assert trained_names(model) == names_of_factors(model)
    assert len(trained_names(model)) == 8


# --------------------------------------------------------------------------------------------------
# Inside `disabled`


@pytest.mark.parametrize("before", [None, {}, {"rank": 6}], ids=["plain", "same", "another"])
def test_an_adapter_loaded_inside_disabled_is_off_until_the_end(file, before):
    source = adapted(fill_seed=1)
    smoa.save(source, file)
    model = Net() if before is None else adapted(**before)
    with smoa.disabled(model):
        smoa.load(model, file)
        assert torch.equal(model(X), Net()(X))
        with smoa.disabled(model):
            assert torch.equal(model(X), Net()(X))
        assert torch.equal(model(X), Net()(X))
    assert torch.equal(model(X), source(X))


def test_an_adapter_injected_inside_disabled_is_off_until_the_end():
    model = Net()
    with smoa.disabled(model):
        smoa.inject(model, ["first", "second"], rank=4, num_blocks=2)
        fill(model)
        assert torch.equal(model(X), Net()(X))
    assert torch.equal(model(X), adapted()(X))


def test_another_model_is_not_disabled():
    model, other = adapted(), Net()
    with smoa.disabled(model):
        smoa.inject(other, ["first", "second"], rank=4, num_blocks=2)
        assert torch.equal(fill(other)(X), adapted()(X))


def test_two_models_disabled_over_each_other_end_in_any_order():
    one, two = Net(), Net()
    of_one, of_two = smoa.disabled(one), smoa.disabled(two)
    of_one.__enter__()
    of_two.__enter__()
    of_one.__exit__(None, None, None)
    smoa.inject(one, ["first", "second"], rank=4, num_blocks=2)
    assert torch.equal(fill(one)(X), adapted()(X))  # no longer disabled
    smoa.inject(two, ["first", "second"], rank=4, num_blocks=2)
    assert torch.equal(fill(two)(X), Net()(X))  # still disabled
    of_two.__exit__(None, None, None)
    assert torch.equal(two(X), adapted()(X))


def test_a_file_of_two_layers_is_refused_where_both_are_one_module(file):
    smoa.save(adapted(width=6), file)
    model = Net(width=6)
    model.second = model.first
    with refused(ValueError, "first", "second", "one module", model=model):
        smoa.load(model, file)


# ------------------------------------------------------------------------------------------------
# A layer that is itself the model; a model without values


def lone_layer(seed):
    torch.manual_seed(seed)
    return smoa.SMoALinear(nn.Linear(6, 8), rank=4)


def test_a_lone_layer_is_saved_and_filled_in_place(file):
    layer, fresh = fill(lone_layer(0)), lone_layer(0)
    smoa.save(layer, file)
    assert smoa.load(fresh, file) == [""]
    assert torch.equal(fresh(X), layer(X))


def test_a_lone_layer_refuses_another_configuration(file):
    smoa.save(fill(lone_layer(0)), file)
    other = smoa.SMoALinear(lone_layer(0).base, rank=2)
    with pytest.raises(ValueError, match="own configuration"):
        smoa.load(other, file)


@pytest.mark.parametrize("verb", ["save", "state_dict", "load_state_dict", "load", "merge"])
def test_a_model_without_values_is_refused_by_name(verb, file):
    model = adapted()
    smoa.save(model, file)
    state = smoa.state_dict(model)
    model.to("meta")
    calls = {
        "save": lambda: smoa.save(model, file),
        "state_dict": lambda: smoa.state_dict(model),
        "load_state_dict": lambda: smoa.load_state_dict(model, state),
        "load": lambda: smoa.load(model, file),
        "merge": lambda: smoa.merge(model),
    }
    with pytest.raises(ValueError, match="^first: .*meta device"):
        calls[verb]()


# --------------------------------------------------------------------------------------------------
# What is open, copied or changed in between


@pytest.mark.parametrize("merged", [False, True])
def test_contexts_of_disabled_may_end_in_any_order(merged):
    model = adapted()
    if merged:
        smoa.merge(model)
    with smoa.disabled(model):
        off = model(X)
    first, second = smoa.disabled(model), smoa.disabled(model)
    before = model(X)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(model(X), off)
    second.__exit__(None, None, None)
    assert torch.equal(model(X), before)
    assert all(layer.merged == merged for _, layer in smoa.adapters(model))


def test_when_one_layer_cannot_be_merged_again_the_others_are_on_at_the_end_of_disabled():
    model = adapted(targets=("first", "second", "head"))
    smoa.merge(model)
    with pytest.raises(ValueError, match="computed"):
        with smoa.disabled(model):
            nn.utils.parametrizations.weight_norm(model.first.base)
    assert all(layer.enabled for _, layer in smoa.adapters(model))


def test_a_layer_taken_out_inside_disabled_and_put_back_later_is_on():
    model = adapted()
    expected = model(X)
    with smoa.disabled(model):
        layer = model.first
        model.first = layer.base
    model.first = layer
    assert torch.equal(model(X), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "verb, message",
    [(smoa.merge, "first.*load the model under"), (lambda m: m.first.merge(), "inference")],
)
def test_a_weight_that_cannot_be_written_leaves_the_layer_unmerged(verb, message):
    with torch.inference_mode():
        model = Net().requires_grad_(False)
    smoa.inject(model, ["first", "second"], rank=4, num_blocks=2)
    expected = fill(model)(X)
    with pytest.raises((ValueError, RuntimeError), match=message):
        verb(model)
    assert not any(layer.merged for _, layer in smoa.adapters(model))
    assert torch.equal(model(X), expected)


def test_a_merge_that_is_stopped_half_way_leaves_the_weight_as_it_was(monkeypatch):
    layer = adapted().first
    before, put = bits(layer.base.weight), smoa.SMoALinear._put

    def put_one_block(self, W, blocks):
        put(self, W, blocks[:1])
        monkeypatch.undo()  # W0's blocks can be put back
        raise KeyboardInterrupt

    monkeypatch.setattr(smoa.SMoALinear, "_put", put_one_block)
    with pytest.raises(KeyboardInterrupt):
        layer.merge()
    assert not layer.merged and bits(layer.base.weight) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_compiled_layer_computes_with_its_own_factors(duplicate):
    model = adapted()
    model.first.compile(backend="eager")
    twin = duplicate(model)
    fill(twin, seed=1)
    assert torch.equal(twin(X), adapted(fill_seed=1)(X))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_inside_disabled_is_on(duplicate):
    model = adapted()
    expected = model(X)
    with smoa.disabled(model):
        twin = duplicate(model)
        assert not torch.equal(model(X), expected)
    assert torch.equal(twin(X), expected)


def test_a_new_alpha_acts_and_is_saved(file):
    model, fresh = adapted(), Net()
    model.first.alpha *= 2
    assert model.first.scale == 2 * model.second.scale
    smoa.save(model, file)
    smoa.load(fresh, file)
    assert torch.equal(fresh(X), model(X))
    with pytest.raises(AttributeError):
        model.first.scale = 3.0


def weight_normed(model):
    nn.utils.parametrizations.weight_norm(model.first, "B_0")


def pruned(model):
    prune.l1_unstructured(model.first, "B_0", 0.5)


@pytest.mark.parametrize("compute", [weight_normed, pruned])
def test_factors_that_are_computed_are_refused_by_name(compute):
    model = adapted(targets=["first"])
    state = smoa.state_dict(model)
    compute(model)
    verbs = [
        lambda: smoa.load_state_dict(model, state),
        lambda: smoa.state_dict(model),
        lambda: smoa.inject(model, ["second"], rank=4),
    ]
    for verb in verbs:
        with pytest.raises(ValueError, match="first: the factors A_0, B_0 are computed"):
            verb()


@pytest.mark.parametrize("cannot", [lambda t: t.to("meta"), torch.Tensor.to_sparse])
def test_a_factor_without_dense_values_is_refused_before_any_is_copied(cannot):
    model = adapted()
    before = model(X)
    state = {key: tensor.detach() * 1 for key, tensor in smoa.state_dict(model).items()}
    for key in state:
        if "A_" in key:
            state[key] = 2 * state[key]
    state["second.B_1"] = cannot(state["second.B_1"])
    with pytest.raises(ValueError, match="second.B_1: a dense real tensor"):
        smoa.load_state_dict(model, state)
    assert torch.equal(model(X), before)


def test_a_load_in_inference_mode_can_be_followed_by_another(file):
    model, fresh = adapted(), Net()
    smoa.save(model, file)
    with torch.inference_mode():
        smoa.load(fresh, file)
    smoa.load(fresh, file)
    torch.testing.assert_close(fresh(X), model(X))


@pytest.mark.parametrize("load", [smoa.load_state_dict, nn.Module.load_state_dict])
def test_what_was_loaded_in_inference_mode_can_be_trained(way, load):
    model = adapted(dropout=0.1)
    states = {
        smoa.load_state_dict: smoa.state_dict,
        nn.Module.load_state_dict: nn.Module.state_dict,
    }
    state = copy.deepcopy(states[load](adapted(fill_seed=1)))
    with torch.inference_mode():
        load(model, state)
    model(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_whole_numbers_of_numpy_are_taken_and_saved(file):
    model, fresh = Net(), Net()
    smoa.inject(model, ["first"], rank=np.int64(4), num_blocks=np.int32(2))
    smoa.save(model, file)
    smoa.load(fresh, file)
    assert (fresh.first.rank, fresh.first.num_blocks) == (4, 2)


def test_the_average_of_equal_orders_is_that_order():
    a, b = adapted(width=700), adapted(width=700, fill_seed=1)
    states = smoa.state_dict(a), smoa.state_dict(b)
    state = {key: 0.9 * states[0][key] + 0.1 * states[1][key] for key in states[0]}
    assert any(not torch.equal(t, t.round()) for key, t in state.items() if key.endswith("order"))
    smoa.load_state_dict(b, state)
    assert same_orders(
        (b.first.row_order, b.first.col_order), (a.first.row_order, a.first.col_order)
    )


def test_an_order_that_is_whole_only_when_rounded_is_refused():
    model = adapted()
    state = smoa.state_dict(model)
    state["first.order"] = state["first.order"] + 0.3
    with refused(ValueError, "first.order", "permutation", model=model):
        smoa.load_state_dict(model, state)


def test_an_order_that_was_cast_to_float_is_still_that_order():
    model, fresh = adapted(), adapted(fill_seed=1)
    state = {key: tensor.double() for key, tensor in smoa.state_dict(model).items()}
    smoa.load_state_dict(fresh, state)
    assert torch.equal(fresh(X), model(X))
