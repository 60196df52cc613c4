"""What a file brings back, what is refused, and what travels in a model's own state dict."""

import io
import pickle
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import (
    Net,
    adapted,
    all_bits,
    bits,
    both_sizes,
    dense,
    gradients,
    input_for,
    near,
    normal,
    refused,
    snapshot,
    trained_names,
)
from strategies import HALVES
from torch import nn

import smoa

CORNERS = {
    "SMoA": {},
    "HiRA": {"num_blocks": 1},
    "MELoRA": {"modulate": False, "order": "natural"},
    "LoRA": {"num_blocks": 1, "modulate": False},
    "blocks without a pair": {"rank": 2, "num_blocks": 4, "alpha": 3, "dropout": 0.25},
    "numbers of numpy": {
        "rank": np.int64(4),
        "num_blocks": np.int32(2),
        "alpha": np.float64(8),
        "dropout": np.float32(0.5),
    },
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "adapter.pt"


# ------------------------------------------------------------------------------------------------
# There and back


@both_sizes
@pytest.mark.parametrize("options", CORNERS.values(), ids=CORNERS)
@pytest.mark.parametrize("merged", [False, True])
def test_a_file_brings_back_the_adapter(file, options, merged, size):
    model, fresh = adapted(size, **options).eval(), Net(size).eval()
    x = input_for(model)
    y = model(x)
    if merged:
        smoa.merge(model)
    smoa.save(model, file)
    assert smoa.load(fresh, file) == ["first", "second"]
    assert torch.equal(fresh(x), y) and not fresh.first.merged
    assert str(fresh.first) == str(model.first)
    smoa.unmerge(model)
    assert all_bits(gradients(fresh, x)) == all_bits(gradients(model, x))


@both_sizes
@pytest.mark.parametrize("dtype", [torch.float64, *HALVES])
def test_a_base_in_another_dtype_is_accepted(file, dtype, size):
    model, cast = adapted(size), Net(size, dtype)
    smoa.save(model, file)
    smoa.load(cast, file)
    narrow = torch.float32 if dtype == torch.float64 else dtype
    assert near(cast.first.weight.to(narrow), dense(model.first).to(narrow), 2)
    smoa.save(cast, file)
    smoa.load(model, file)


def test_no_spectrum_is_computed_again(file, monkeypatch):
    order = torch.randperm(10), torch.randperm(8)
    smoa.save(adapted(targets=["first"], order=order), file)
    monkeypatch.setattr(smoa, "spectral_order", None)
    model = Net()
    smoa.load(model, file)
    assert torch.equal(model.first.row_order, order[0])
    assert torch.equal(model.first.col_order, order[1])


# ------------------------------------------------------------------------------------------------
# What trains is what is saved


def with_a_new_head():
    """As a classifier is tuned: adapters, a head of its own, LayerNorms, and a bias."""
    model = adapted()
    model.head.reset_parameters()
    for part in (model.head, model.norm, model.first.base.bias):
        part.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    gradients(model, input_for(model))
    optimizer.step()
    return model


def test_what_trains_is_what_is_saved(file):
    model, fresh = with_a_new_head(), Net()
    smoa.save(model, file)
    state = torch.load(file, weights_only=True)  # it is plain data
    extra = {"first.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert state["trained"].keys() == extra
    assert bits(state["layers"]["second"]["B"][1]) == bits(model.second.B[1])
    smoa.load(fresh, file)
    x = input_for(model)
    assert torch.equal(fresh(x), model(x))
    assert trained_names(fresh) == trained_names(model) and len(trained_names(fresh)) == 5 + 8
    assert all_bits(gradients(fresh, x)) == all_bits(gradients(model, x))
    smoa.save(adapted(), file)  # which trains no head: that one comes to rest
    smoa.load(fresh, file)
    assert trained_names(fresh) == trained_names(adapted())
    assert all(p.grad is None for p in fresh.parameters())


# ------------------------------------------------------------------------------------------------
# A load replaces what is there, or changes nothing

BEFORE = {
    "none": lambda: Net(),
    "the same": lambda: adapted(seed=5),
    "another": lambda: adapted(seed=5, rank=7, num_blocks=3, alpha=2, modulate=False),
    "elsewhere": lambda: adapted(seed=5, targets=["second", "head"]),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("before", BEFORE)
def test_a_load_replaces_the_adapter(file, before, merged):
    source, model = adapted(), BEFORE[before]()
    smoa.save(source, file)
    if merged and before != "none":
        smoa.merge(model)
    assert smoa.load(model, file) == ["first", "second"]
    x = input_for(source)
    assert torch.equal(model(x), source(x))
    assert trained_names(model) == trained_names(source)
    assert all_bits(smoa.unload(model).state_dict()) == all_bits(Net().state_dict())


def differs(W, E):
    return W + E * (0.01 * W.norm() / E.norm())


OTHER_BASES = {
    "drawn again": lambda W: normal(*W.shape, seed=8) / 3,
    "two rows swapped": lambda W: W[[3, 1, 2, 0, *range(4, len(W))]],
    "1 % away in scale": lambda W: differs(W, W),
    "1 % away everywhere": lambda W: differs(W, normal(*W.shape, seed=8)),
    "1 % away in a column": lambda W: differs(W, torch.eye(W.shape[1])[1].expand_as(W)),
}


@both_sizes
@pytest.mark.parametrize("change", OTHER_BASES.values(), ids=OTHER_BASES)
def test_a_wrong_base_is_refused(file, change, size):
    source = adapted(size, order="natural")
    smoa.save(source, file)
    merged, model = adapted(size, seed=5, order="natural").eval(), Net(size)
    merged.second.base.weight.data = model.second.weight.data = change(model.second.weight.data)
    smoa.merge(merged)
    x = input_for(model)
    y = merged(x)
    for other in (model, merged):
        with refused("second: ", "another base weight", "check_base=False", model=other):
            smoa.load(other, file)
    assert torch.equal(merged(x), y)
    smoa.load(model, file, check_base=False)
    assert bits(model.second.A[0]) == bits(source.second.A[0])


MISFITS = {  # (name, what the model has there, words of the error)
    "no head": ("head", nn.Identity(), ["head.weight", "head.bias"]),
    "another head": ("head", nn.Linear(8, 4), ["head.weight", "(3, 8)", "(4, 8)"]),
    "no layer": ("second", nn.Sequential(), ["second"]),
    "another layer": ("second", nn.Linear(10, 7), ["second"]),
}


@pytest.mark.parametrize("name, other, words", MISFITS.values(), ids=MISFITS)
def test_another_model_is_refused(file, name, other, words):
    smoa.save(with_a_new_head(), file)
    model = adapted(seed=5, targets=["first"])
    model.set_submodule(name, other)
    with refused(*words, model=model):
        smoa.load(model, file)


# ------------------------------------------------------------------------------------------------
# Anything but a whole file of SMoA is refused


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):  # what unpickling would call
        return Path.touch, (self.mark,)


def written(content, zipped=True):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


WHOLE = written(smoa.state_dict(adapted()))
NO_ADAPTERS = {
    "half of one": WHOLE[: len(WHOLE) // 2],
    "all but a byte": WHOLE[:-1],
    "nothing": b"",
    "an HTML page": b"<!DOCTYPE html><html><body>404: Not Found</body></html>",
    "the start of a zip file": b"PK\3\4",
    "safetensors": b"\2\0\0\0\0\0\0\0{}",
    "a state dict": written(Net().state_dict()),
    "an adapted model's": written(adapted().state_dict()),
    "an empty dict": written({}),
    "no layer": written({"layers": {}, "trained": {}}),
    "a layer of nothing": written({"layers": {"first": {}}, "trained": {}}),
}


@pytest.mark.parametrize("content", NO_ADAPTERS.values(), ids=NO_ADAPTERS)
def test_another_tool_s_file_is_refused(file, content):
    file.write_bytes(content)
    model = adapted()
    smoa.merge(model)
    with refused("SMoA adapter", model=model):
        smoa.load(model, file)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_pickled_code_is_run(file, tmp_path, zipped):
    mark, model = tmp_path / "the payload ran", Net()
    state = smoa.state_dict(adapted()) | {"trained": Payload(mark)}
    for content in (written(state, zipped), pickle.dumps(state)):
        file.write_bytes(content)
        with refused(str(file), model=model):
            smoa.load(model, file)
        assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_changes_an_adapter(file, share, bit):
    """It is refused, or sits where a zip file keeps nothing that counts, such as a date."""
    source, model = adapted(targets=["second"], rank=2), Net()
    smoa.save(source, file)
    content, before = bytearray(file.read_bytes()), snapshot(model)
    content[int(share * len(content))] ^= 1 << bit
    file.write_bytes(content)
    try:
        smoa.load(model, file)
    except ValueError as error:
        assert "damaged" in str(error)
        assert snapshot(model) == before
    else:
        assert snapshot(model)["tensors"] == snapshot(source)["tensors"]


def test_a_flipped_flag_of_the_directory_is_refused(file):
    smoa.save(adapted(), file)
    whole, model = file.read_bytes(), Net()
    entries = [found.start() for found in re.finditer(b"PK\x01\x02", whole)]
    for entry in entries:
        content = bytearray(whole)
        content[entry + 38] ^= 0x10  # "this is a folder": no checksum covers it
        file.write_bytes(content)
        with refused("damaged", model=model):
            smoa.load(model, file)
    assert len(entries) > 8


def test_what_is_not_there_is_an_oserror(tmp_path):
    model = adapted()
    for verb in (smoa.load, smoa.save):
        with refused("missing", model=model, error=FileNotFoundError):
            verb(model, tmp_path / "missing" / "adapter.pt")
        with refused(str(tmp_path), model=model, error=OSError):
            verb(model, tmp_path)


@pytest.mark.parametrize("size", [0, 100, 4096])
def test_a_save_that_fails_keeps_the_old_file(file, size):
    smoa.save(adapted(), file)
    old, model = file.read_bytes(), adapted(seed=5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(OSError):
            smoa.save(model, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == old


def test_a_save_goes_through_a_link(file, tmp_path):
    (tmp_path / "folder").mkdir()
    file.symlink_to(tmp_path / "folder" / "target.pt")
    smoa.save(adapted(), str(file))
    assert file.is_symlink() and smoa.load(Net(), tmp_path / "folder" / "target.pt")


# ------------------------------------------------------------------------------------------------
# The model's own state dict, as a Trainer or a checkpoint has it


@both_sizes
@pytest.mark.parametrize("merged", [False, True])
def test_a_state_dict_is_strict_and_has_the_orders(size, merged):
    model, other = adapted(size), adapted(size, seed=5, order="natural")
    if merged:
        smoa.merge(other)
    state = torch.load(io.BytesIO(written(model.state_dict())), weights_only=True)
    other.load_state_dict(state)
    assert not other.first.merged and not dict(other.named_buffers())
    assert torch.equal(other.first.row_order, model.first.row_order)
    assert torch.equal(other(input_for(model)), model(input_for(model)))
    del state["first.A.0"]
    with pytest.raises(RuntimeError, match="Missing key.*first.A.0"):
        other.load_state_dict(state)


@pytest.mark.parametrize("options", [{"alpha": 3}, {"modulate": False}], ids=str)
def test_a_state_dict_of_another_setting_is_refused(options):
    model = adapted()
    with pytest.raises((ValueError, RuntimeError), match="alpha or modulate"):
        model.load_state_dict(adapted(**options).state_dict())


def test_a_merged_model_has_no_state_dict():
    model = adapted()
    model.second.merge()
    words = ["merged", "unmerge", "unload(model, merge=True)"]
    with refused(*words, model=model, error=RuntimeError):
        model.state_dict()
