"""What is written to a file, what is refused when it is read, and what travels in a model's own state."""

import copy
import hashlib
import io
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import HALVES, Net, adapted, bits, fill, normal, options, snapshot
from torch import nn

import smoa

X = normal(4, 6, seed=3, dtype=torch.float32)
reuses_a_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # tmp_path: every example writes its own file
model_options = (
    options(5, 6)
    .map(lambda drawn: drawn | {"order": "spectral", "num_blocks": min(drawn["num_blocks"], 4)})
    .filter(
        lambda drawn: (
            "branch_ranks" not in drawn or len(drawn["branch_ranks"]) == drawn["num_blocks"]
        )
    )
)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "adapter.pt"


def all_bits(tensors):
    return {key: bits(tensor) for key, tensor in tensors.items()}


def refuse(call, model, *words):
    """The call raises one ValueError that has all the words in it, and leaves no trace in the model."""
    before, y = snapshot(model), model(X.to(next(model.parameters()).dtype))
    with pytest.raises(ValueError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value
    assert snapshot(model) == before and torch.equal(model(X.to(y.dtype)), y)


# ---------------------------------------------------------------------------------------------------------------------
# There and back


@reuses_a_folder
@given(layer_options=model_options, merged=st.booleans())
def test_loaded_adapter_gives_the_same_outputs(file, layer_options, merged):
    model, fresh = adapted(**layer_options), Net()
    expected = model(X)
    if merged:
        smoa.merge(model)
    smoa.save(model, file)
    assert smoa.load(fresh, file) == ["first", "second"]
    assert torch.equal(fresh(X), expected) and not fresh.first.merged
    for (_, here), (_, there) in zip(smoa.adapters(fresh), smoa.adapters(model)):
        assert (
            str(here) == str(there)
            and here.scale == there.scale
            and here.branch_ranks == there.branch_ranks
        )


@reuses_a_folder
@given(layer_options=model_options)
def test_state_dict_of_the_adapter_goes_there_and_back(file, layer_options):
    model, other = adapted(**layer_options), adapted(fill_seed=9, **layer_options)
    smoa.load_state_dict(other, smoa.state_dict(model))
    assert torch.equal(other(X), model(X))
    assert all_bits(smoa.state_dict(other)) == all_bits(smoa.state_dict(model))


def test_loaded_adapter_goes_on_training_as_the_saved_one_would(file):
    model, fresh = adapted(), Net()
    smoa.save(model, file)
    smoa.load(fresh, file)
    for m in (model, fresh):
        m(X).square().sum().backward()
    grads = [
        {name: p.grad for name, p in m.named_parameters() if p.requires_grad}
        for m in (model, fresh)
    ]
    assert grads[0] and all_bits(grads[0]) == all_bits(grads[1])


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES])
@pytest.mark.parametrize("from_dtype", [torch.float32, torch.bfloat16])
def test_adapter_loads_onto_the_base_in_another_floating_dtype(file, from_dtype, dtype):
    model = fill(adapted(dtype=from_dtype), 5)
    smoa.save(model, file)
    base = Net(dtype=from_dtype).to(dtype)
    smoa.load(base, file)
    eps = max(torch.finfo(dtype).eps, torch.finfo(from_dtype).eps)
    # Weights, inputs and two hidden layers are rounded in either dtype, then amplified by a slope of about 10 from input to output.
    torch.testing.assert_close(
        base(X.to(dtype)).double(), model(X.to(from_dtype)).double(), rtol=0, atol=20 * eps
    )


def test_order_travels_with_the_adapter(file, monkeypatch):
    model, expected_rows = adapted(), adapted().first.row_order.tolist()
    smoa.save(model, file)
    state, right = smoa.state_dict(model), smoa.spectral_order
    monkeypatch.setattr(
        smoa, "spectral_order", lambda weight: tuple(order.flip(0) for order in right(weight))
    )  # another machine
    loaded, injected = Net(), adapted(fill_seed=4)
    assert injected.first.row_order.tolist() == expected_rows[::-1]
    smoa.load(loaded, file)
    smoa.load_state_dict(injected, state)
    for here in (loaded, injected):
        assert here.first.row_order.tolist() == expected_rows and torch.equal(here(X), model(X))
    smoa.load(injected, file)  # of the same configuration, so that only values change
    assert torch.equal(injected(X), model(X))


def test_order_given_by_hand_travels_too(file):
    model, fresh = adapted(["first"], order=(torch.arange(8).flip(0), [1, 0, 3, 2, 5, 4])), Net()
    smoa.save(model, file)
    smoa.load(fresh, file)
    assert fresh.first.col_order.tolist() == [1, 0, 3, 2, 5, 4] and torch.equal(fresh(X), model(X))


def test_an_order_given_by_hand_is_copied():
    mine = (torch.arange(5), torch.arange(8))
    layer = smoa.SMoALinear(nn.Linear(8, 5), rank=2, order=mine)
    layer.row_order.copy_(torch.arange(5).flip(0))
    assert mine[0].tolist() == [0, 1, 2, 3, 4]


def test_factors_that_a_layer_shares_are_saved_under_both_names(file):
    model = adapted()
    model.first.A[1] = model.first.A[0]
    smoa.save(model, file)
    smoa.load(fresh := Net(), file)
    assert torch.equal(fresh(X), model(X))


def test_state_does_not_depend_on_the_default_device():
    model = adapted()
    expected = smoa.state_dict(model)
    with torch.device("meta"):
        state = smoa.state_dict(model)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_load_computes_no_spectrum(file, monkeypatch):
    model, fresh = adapted(), Net()
    smoa.save(model, file)
    monkeypatch.setattr(smoa, "spectral_order", None)
    monkeypatch.setattr(torch.linalg, "svd", None)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    smoa.load(fresh, file)
    assert torch.equal(fresh(X), model(X))


@pytest.mark.parametrize("taken_merged", [False, True])
@pytest.mark.parametrize("put_merged", [False, True])
def test_full_state_dict_fits_a_freshly_injected_model(taken_merged, put_merged):
    model, fresh = adapted(), adapted(seed=50, fill_seed=9)
    expected = model(X)
    for m, merged in ((model, taken_merged), (fresh, put_merged)):
        if merged:
            smoa.merge(m)
    assert bits(model.state_dict()["first.base.weight"]) == bits(Net().first.weight)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), expected) and not fresh.first.merged
    smoa.unload(fresh)
    assert all_bits(fresh.state_dict()) == all_bits(Net().state_dict())


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_has_the_same_outputs_and_a_life_of_its_own(duplicate, merged):
    model = adapted()
    if merged:
        smoa.merge(model)
    twin, before = duplicate(model), snapshot(model)
    assert torch.equal(twin(X), model(X)) and twin.first.merged == merged
    smoa.unmerge(twin)
    assert bits(twin.first.base.weight) == bits(Net().first.weight)
    fill(twin, 9)
    smoa.unload(twin, merge=True)
    assert snapshot(model) == before


def test_two_names_of_one_module_get_one_adapter(file):
    model, fresh = nn.ModuleDict({"a": nn.Linear(4, 4)}), nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"], fresh["b"] = model["a"], fresh["a"]
    fresh.load_state_dict(model.state_dict())
    assert smoa.inject(model, ["a"], rank=2) == ["a"]
    assert model["a"] is model["b"] and len(list(smoa.adapters(model))) == 1
    smoa.save(fill(model), file)
    smoa.load(fresh, file)
    assert fresh["a"] is fresh["b"] and torch.equal(
        fresh["b"](torch.eye(4)), model["b"](torch.eye(4))
    )
    smoa.merge(model)  # one module: nobody else shares the weight
    plain = smoa.unload(model)
    assert type(plain["a"]) is nn.Linear and plain["a"] is plain["b"]


def test_either_name_of_a_shared_module_can_be_a_target():
    for targets in (["a"], ["b"], ["a", "b"], "a|b", "b"):
        model = nn.ModuleDict({"a": nn.Linear(4, 4)})
        model["b"] = model["a"]
        smoa.inject(model, targets, rank=2)
        assert model["a"] is model["b"] and len(list(smoa.adapters(model))) == 1


def test_a_shared_module_cannot_be_adapted_twice_under_its_other_name():
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    smoa.inject(model, ["a"], rank=2)
    for target, why in {"b": "adapted already", "b.base": "layers are named a, b"}.items():
        before = snapshot(model)
        with pytest.raises(ValueError, match=why):
            smoa.inject(model, [target], rank=2)
        assert snapshot(model) == before


def test_a_lone_layer_can_be_saved_and_loaded_in_memory():
    layer, other = (fill(smoa.SMoALinear(Net().first, rank=2), seed) for seed in (1, 2))
    smoa.load_state_dict(other, smoa.state_dict(layer))
    assert torch.equal(other(X), layer(X))


# ---------------------------------------------------------------------------------------------------------------------
# Another base


def perturbed(W, kind, share):
    """W and a difference of `share` of its Frobenius norm, of each kind."""
    E = torch.zeros_like(W)
    if kind == "everywhere":
        E = normal(*W.shape, seed=8, dtype=W.dtype)
    elif kind == "one row":
        E[2] = normal(W.shape[1], seed=8, dtype=W.dtype)
    elif kind == "one column":
        E[:, 4] = 1
    elif kind == "one entry":
        E[1, 3] = 1
    elif kind == "scale":
        E = W
    return W + E * (share * W.norm() / E.norm())


def swapped(W, dim):
    order = torch.arange(W.shape[dim])
    order[[0, 3]] = order[[3, 0]]
    return W.index_select(dim, order)


OTHER_BASES = {
    "re-initialised": lambda W: normal(*W.shape, seed=99, dtype=W.dtype),
    "two rows swapped": lambda W: swapped(W, 0),
    "two columns swapped": lambda W: swapped(W, 1),
    "of the other sign": lambda W: -W,
    "zero": torch.zeros_like,
}
for kind in ["everywhere", "one row", "one column", "one entry", "scale"]:
    OTHER_BASES[f"1 % changed, {kind}"] = lambda W, kind=kind: perturbed(W, kind, 0.01)


@pytest.mark.parametrize("width", [8, 300])
@pytest.mark.parametrize("change", OTHER_BASES.values(), ids=OTHER_BASES)
def test_wrong_base_raises_without_mutation(file, change, width):
    model, other = adapted(width=width), Net(width)
    smoa.save(model, file)
    other.second.weight.data.copy_(change(other.second.weight.data))
    refuse(
        lambda: smoa.load(other, file), other, "second", "another base weight", "check_base=False"
    )
    assert smoa.load(other, file, check_base=False) == ["first", "second"]
    assert all(torch.equal(here, there) for here, there in zip(other.second.A, model.second.A))


@pytest.mark.parametrize("share", [1e-3, 1e-5])
@pytest.mark.parametrize("kind", ["everywhere", "one row", "one column", "scale"])
def test_a_base_that_rounding_could_have_changed_is_accepted(file, kind, share):
    model, other = adapted(width=300), Net(300)
    smoa.save(model, file)
    other.second.weight.data.copy_(perturbed(other.second.weight.data, kind, share))
    assert smoa.load(other, file) == ["first", "second"]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("same_configuration", [False, True])
def test_wrong_base_leaves_the_adapter_that_was_there(file, merged, same_configuration):
    smoa.save(adapted(seed=50, fill_seed=1), file)
    model = adapted(fill_seed=2, rank=4 if same_configuration else 6)
    model.second.A[0].requires_grad_(False)
    if merged:
        smoa.merge(model)
    refuse(lambda: smoa.load(model, file), model, "first", "another base weight")


def test_base_of_the_adapter_is_the_unmerged_one(file):
    model, fresh = adapted(), Net()
    smoa.merge(model)
    smoa.save(model, file)
    smoa.load(fresh, file)
    already_merged = smoa.unload(adapted(), merge=True)
    refuse(lambda: smoa.load(already_merged, file), already_merged, "first", "another base weight")


# ---------------------------------------------------------------------------------------------------------------------
# Other shapes, other layers


def test_other_shapes_are_refused(file):
    smoa.save(adapted(width=10), file)
    model = Net()
    refuse(lambda: smoa.load(model, file), model, "first.row_order", "(10,)", "(8,)")


def test_layers_that_the_model_has_not_are_refused(file):
    smoa.save(adapted(["first", "head"]), file)
    model = nn.Sequential()
    model.add_module("first", Net().first)
    before = snapshot(model)
    with pytest.raises(ValueError, match="head"):
        smoa.load(model, file)
    assert snapshot(model) == before


def test_a_name_that_is_no_linear_layer_here_is_refused(file):
    smoa.save(adapted(["first", "head"]), file)
    model = Net()
    model.head = nn.LayerNorm(5)
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match="head"):
        smoa.load(model, file)
    assert snapshot(model) == before


def put(key, change):
    return lambda state: state.update({key: change(state.get(key))})


STATE_FAULTS = {
    "missing": (lambda state: state.pop("second.B.1"), ["second.B.1"]),
    "unexpected": (put("head.A.0", lambda _: torch.ones(1, 1)), ["head.A.0"]),
    "another rank": (
        put("second.A.0", lambda _: torch.ones(3, 4)),
        ["second.A.0", "(3, 4)", "(2, 4)"],
    ),
    "no permutation": (
        put("second.row_order", torch.zeros_like),
        ["second.row_order", "permutation", "4"],
    ),
    "of another base": (
        put("second.base_sketch", lambda sketch: 2 * sketch),
        ["second", "another base weight"],
    ),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("fault, words", STATE_FAULTS.values(), ids=STATE_FAULTS)
def test_state_that_does_not_fit_is_refused(fault, words, merged):
    model, state = adapted(fill_seed=2), smoa.state_dict(adapted(fill_seed=1))
    fault(state)
    if merged:
        smoa.merge(model)
    refuse(lambda: smoa.load_state_dict(model, state), model, *words)


def test_a_refused_load_does_not_merge_again_what_was_changed_after_the_merge():
    model = adapted()
    smoa.merge(model)
    fill(model, seed=9)
    refuse(lambda: smoa.load_state_dict(model, {}), model, "missing")


def test_state_for_a_model_without_an_adapter_is_refused(file):
    model = Net()
    refuse(
        lambda: smoa.load_state_dict(model, smoa.state_dict(adapted())),
        model,
        "first.A.0",
        "unexpected",
    )
    refuse(lambda: smoa.save(model, file), model, "no adapter", "inject")
    assert not file.exists()


# ---------------------------------------------------------------------------------------------------------------------
# The file


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):  # what unpickling would call
        return Path.touch, (self.mark,)


def sealed(body):
    """The body of a file with the checksum that `load` looks for."""
    return body + hashlib.sha256(body).digest()


def payload_files(mark, good):
    """Files that run code in a reader that unpickles: bare, from torch.save, in its older format too, with a checksum, and behind a good file."""
    yield pickle.dumps(Payload(mark))
    for new_format in (True, False):
        torch.save(
            {"config": {}, "state": Payload(mark)},
            mark.with_suffix(".pt"),
            _use_new_zipfile_serialization=new_format,
        )
        content = mark.with_suffix(".pt").read_bytes()
        yield content
        yield sealed(content)
    yield good + pickle.dumps(Payload(mark))
    yield good[:-32] + pickle.dumps(Payload(mark)) + good[-32:]


def test_a_file_with_a_pickled_object_is_refused_and_runs_nothing(file, tmp_path):
    smoa.save(adapted(), file)
    mark, model = tmp_path / "the payload ran", Net()
    for content in payload_files(mark, file.read_bytes()):
        file.write_bytes(content)
        refuse(lambda: smoa.load(model, file), model, str(file))
        assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # it would have


@reuses_a_folder
@given(share=st.floats(0, 1, exclude_max=True), merged=st.booleans())
def test_a_truncated_file_is_refused(file, share, merged):
    smoa.save(adapted(), file)
    content, model = file.read_bytes(), adapted(fill_seed=2)
    file.write_bytes(content[: int(share * len(content))])
    if merged:
        smoa.merge(model)
    refuse(lambda: smoa.load(model, file), model, str(file), "damaged")


@reuses_a_folder
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_refused(file, share, bit):
    smoa.save(adapted(["second"], rank=2), file)
    content, model = bytearray(file.read_bytes()), Net()
    content[int(share * len(content))] ^= 1 << bit
    file.write_bytes(content)
    refuse(lambda: smoa.load(model, file), model, str(file), "damaged")


def test_the_older_format_which_can_hide_code_from_older_torch_is_refused(file):
    smoa.save(adapted(), file)
    body, model = io.BytesIO(), Net()
    torch.save(
        torch.load(io.BytesIO(file.read_bytes()), weights_only=True),
        body,
        _use_new_zipfile_serialization=False,
    )
    file.write_bytes(sealed(body.getvalue()))
    refuse(lambda: smoa.load(model, file), model, str(file), "no SMoA adapter")


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, b"\xff" * 64, b"\2\0\0\0\0\0\0\0{}", b"hello, world", b"{}", b"PK"]
)
def test_a_file_of_something_else_is_refused(file, content):
    file.write_bytes(content)
    model = Net()
    refuse(lambda: smoa.load(model, file), model, str(file), "no SMoA adapter")


def test_a_file_that_is_not_there_is_an_oserror(file):
    model = Net()
    before = snapshot(model)
    with pytest.raises(OSError, match=file.name):
        smoa.load(model, file)
    assert snapshot(model) == before


def test_the_file_is_what_torch_save_writes_and_a_checksum_after_it(file):
    model = adapted()
    smoa.save(model, file)
    content = file.read_bytes()
    assert content == sealed(content[:-32])
    there = torch.load(io.BytesIO(content[:-32]), weights_only=True)
    assert there.keys() == {"config", "state"} and {
        name: options["rank"] for name, options in there["config"].items()
    } == {"first": 4, "second": 4}
    here = smoa.state_dict(model)
    assert there["state"].keys() == here.keys() and all(
        torch.equal(there["state"][key], here[key]) for key in here
    )


@pytest.mark.parametrize(
    "content",
    [{}, {"config": {}}, {"config": {}, "state": {"A": 1}}, [1], {"config": {}, "state": []}],
    ids=repr,
)
def test_a_whole_file_of_another_content_is_refused(file, content):
    body, model = io.BytesIO(), Net()
    torch.save(content, body)
    file.write_bytes(sealed(body.getvalue()))
    refuse(lambda: smoa.load(model, file), model, str(file), "no SMoA adapter")


def test_save_writes_one_file_and_replaces_an_old_one_whole(file, monkeypatch):
    smoa.save(adapted(fill_seed=1), file)
    old, replace, seen = file.read_bytes(), Path.replace, []
    monkeypatch.setattr(
        Path,
        "replace",
        lambda *args: (seen.append((file.read_bytes(), args[0].read_bytes())), replace(*args)),
    )
    smoa.save(adapted(fill_seed=2), file)
    assert seen == [
        (old, file.read_bytes())
    ]  # until the very end the old file was there, and then the new one was complete
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    smoa.save(adapted(fill_seed=1), file)
    old = file.read_bytes()

    def write_until_the_disk_is_full(path, content):
        with path.open("wb") as half:
            half.write(content[:100])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", write_until_the_disk_is_full)
    with pytest.raises(OSError, match="disk full"):
        smoa.save(adapted(fill_seed=2), file)
    assert file.read_bytes() == old and [path.name for path in file.parent.iterdir()] == [file.name]


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


# ---------------------------------------------------------------------------------------------------------------------
# Swapping


ADAPTERS = {
    "the same configuration": dict(),
    "another rank": dict(rank=7, num_blocks=3),
    "other targets": dict(targets=["second", "head"]),
    "fewer targets": dict(targets=["head"], rank=2),
    "other switches": dict(modulate=False, alpha=3, dropout=0.25, branch_ranks=[0, 4]),
    "another order": dict(order="natural"),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("other", ADAPTERS.values(), ids=ADAPTERS)
def test_swapping_adapters_leaves_no_trace_of_the_one_before(tmp_path, other, merged):
    files, outputs = [tmp_path / "A", tmp_path / "B"], []
    for path, layer_options, seed in zip(files, (dict(), other), (1, 2)):
        model = adapted(**layer_options, fill_seed=seed).eval()
        smoa.save(model, path)
        outputs.append(model(X))
    model = Net().eval()
    for i in (0, 1, 0):
        smoa.load(model, files[i])
        assert torch.equal(model(X), outputs[i])
        if merged:
            smoa.merge(model)
    again = Net().eval()
    smoa.load(again, files[0])
    smoa.unmerge(model)
    values, frozen, modules, _ = snapshot(model)
    assert (values, frozen) == snapshot(again)[:2]
    assert {name: kind for name, (_, kind, _) in modules.items()} == {
        name: kind for name, (_, kind, _) in snapshot(again)[2].items()
    }
    smoa.unload(model)
    assert all_bits(model.state_dict()) == all_bits(Net().state_dict())


def test_an_optimizer_keeps_its_hold_when_only_values_change(file):
    smoa.save(adapted(fill_seed=1), file)
    model = adapted(fill_seed=2)
    held = [id(p) for p in model.parameters()]
    smoa.load(model, file)
    assert [id(p) for p in model.parameters()] == held and torch.equal(
        model(X), adapted(fill_seed=1)(X)
    )
