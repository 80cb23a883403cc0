"""Tuned tables: taken near an entry's sizes and only there, on GPUs like the one searched on; a wrong one is refused."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashcore import plan, tuned
from flashcore.build.sets import BuiltSet
from flashcore.errors import ArgumentValueError
from flashcore.evidence import Index, build
from flashcore.evidence.build import unproved_entries
from flashcore.kernels.hopper import binding as hopper
from flashcore.kernels.portable import binding as portable
from flashcore.kernels.registry import BINDINGS
from flashcore.kernels.small import binding as small
from flashcore.nearness import Sizes, distance
from flashcore.plan import make_plan
from flashcore.runtime import store
from flashcore.search import promote
from flashcore.search.kernels import SEARCHABLE
from flashcore.search.schema import Problem
from flashcore.sources import kernel_hash
from flashcore.spec import AttentionSpec
from flashcore.target import Target
from flashcore.tuned import Entry, Ratio, Table

SIZES = {"batch": 1, "heads": 8, "heads_k": 8, "seqlen_q": 512, "seqlen_k": 512, "head_dim": 64, "head_dim_v": 64}
SMALL_FORM = {"cluster": 4, "keys": 128, "block_n": 64}
PORTABLE_FORM = {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2, "edge_stages": 1}
HOPPER_FORM = {
    **{"warpgroups": 2, "block_n": 64, "q_slots": 1, "kv_slots": 2},
    **dict.fromkeys(("q_registers", "o_shares_q", "join_tiles", "skip_rescale", "emulate_exp2", "hold_wait"), False),
}
FORMS = {"small": SMALL_FORM, "portable": PORTABLE_FORM, "hopper": HOPPER_FORM}
SHA256 = {"fp16": "1" * 64, "bf16": "2" * 64}


def _entry(impl: str = "small", config: dict | None = None, **changes: Any) -> Entry:
    """One of the kernel's FORMS unless config is given; `changes` are of the problem where it has such a field."""
    sizes = {name: changes.pop(name, size) for name, size in SIZES.items()}
    options = {name: changes.pop(name) for name in ("causal", "mask", "dtype") if name in changes}
    problem = Problem(impl=impl, **sizes, **options)
    searchable = SEARCHABLE[impl]
    fields = {
        "problem": problem,
        "features": searchable.binding.features(searchable.spec(problem)),
        "config": FORMS[impl] if config is None else config,
        "ratio": Ratio(value=1.1, low=1.05, high=1.15),
        "unseen": {},
        "source_sha256": kernel_hash(searchable.binding.KERNEL),
        "sha256": SHA256,
        "search": "search-x.json",
        "retests": [],
        "words": "the fastest",
    }
    return Entry(**{**fields, **changes})


def _hand_chosen(**changes: Any) -> Entry:
    nothing = {"config": None, "ratio": None, "sha256": {}, "words": "none of 9 measured forms is faster beyond noise"}
    return _entry().model_copy(update={**nothing, **changes})


@pytest.fixture
def table(tuned_folder: Path) -> Callable[..., Path]:
    """Writes a table of these entries."""

    def write(*entries: Entry, gpu: str = "NVIDIA H200", arch: str = "sm_90a", sm_count: int = 132) -> Path:
        path = tuned_folder / "nvidia-h200.json"
        Table(gpu=gpu, arch=arch, sm_count=sm_count, entries=list(entries)).save(path)
        tuned.forget()
        return path

    return write


@pytest.fixture
def call(make_spec: Callable[..., AttentionSpec]) -> Callable[..., AttentionSpec]:
    """The spec of the mission's call, with changes."""

    def make(heads: int = 8, length: int = 512, **changes: Any) -> AttentionSpec:
        sizes = {"batch": 1, "heads_q": heads, "heads_k": heads, "seqlen_q": length, "seqlen_k": length, "head_dim": 64}
        return make_spec(**{**sizes, **changes})

    return make


def _form(impl: str, spec: AttentionSpec, sm_count: int = 132, arch: str = "sm_90a") -> dict | None:
    """The tuned form that a call's binary is of, None: it is the hand-chosen form's."""
    binding, searchable = BINDINGS[impl], SEARCHABLE[impl]
    binary = binding.specialise_call(spec, arch, sm_count)
    if binary == searchable.form.specialise(spec, binding.hand_chosen(spec, arch, sm_count)):
        return None
    assert binary == searchable.form.specialise(spec, searchable.configure(FORMS[impl]))
    return FORMS[impl]


@pytest.mark.parametrize("impl", FORMS)
def test_an_entry_is_taken_near_its_sizes_and_only_there(impl: str, table: Callable, call: Callable) -> None:
    table(_entry(impl))
    near = [call(), call(length=300), call(heads=4), call(heads=16), call(seqlen_q=140), call(dtype=torch.bfloat16)]
    assert [_form(impl, spec) for spec in near] == [FORMS[impl]] * len(near)
    far = [call(heads=2), call(heads=24), call(length=180), call(heads=4, length=333), call(seqlen_q=63)]
    assert [_form(impl, spec) for spec in far] == [None] * len(far)
    # of other features, however near
    others = [call(causal=True), call(head_dim=128)]
    assert [_form(impl, spec) for spec in others] == [None] * len(others)


@pytest.mark.parametrize("impl", ["hopper", "small"])
def test_a_head_dim_that_is_padded_to_an_entrys_is_as_near(impl: str, table: Callable, call: Callable) -> None:
    table(_entry(impl))
    for head_dim in (48, 64):
        # with what the head dims differ by it would be too far
        spec = call(heads=3, head_dim=head_dim)
        assert _form(impl, spec) == FORMS[impl]


@pytest.mark.parametrize("impl", FORMS)
def test_nothing_tuned_is_the_hand_chosen_form(impl: str, table: Callable, call: Callable) -> None:
    assert _form(impl, call()) is None
    table()
    assert _form(impl, call()) is None


def test_distance_is_in_factors_of_two(call: Callable) -> None:
    one = Sizes(8, 512, 512, 64)
    assert Sizes.of(call(head_dim_v=32)) == one and distance(one, one) == 0
    assert distance(one, Sizes(16, 512, 512, 64)) == 1 == distance(one, Sizes(8, 512, 512, 128))
    assert distance(one, Sizes(8, 128, 512, 64)) == 1 == distance(Sizes(8, 512, 128, 64), one)
    assert distance(one, Sizes(4, 1024, 1024, 64)) == 2


def test_the_nearest_entry_has_the_say(table: Callable, call: Callable) -> None:
    table(_entry(), _hand_chosen(problem=_entry(heads=16, heads_k=16).problem))
    assert _form("small", call()) == _form("small", call(heads=9)) == SMALL_FORM
    # where the hand-chosen form was not beaten it stands, though another entry is near too
    assert _form("small", call(heads=16)) is None and _form("small", call(heads=13)) is None


def test_a_form_that_cannot_run_a_call_is_passed_over(table: Callable, call: Callable) -> None:
    other = {"cluster": 4, "keys": 256, "block_n": 128}
    table(_entry(), _entry(config=other, seqlen_q=1024, seqlen_k=1024, sha256={"fp16": "3" * 64, "bf16": "4" * 64}))
    # more keys than the nearest entry's form has room for
    spec = call(seqlen_k=513)
    assert dict(small.specialise_call(spec, "sm_90a", 132).constants)["KEYS"] == 256
    assert tuned.find("small", spec, "sm_90a", 132).config.keys == 256
    # with no other near, the hand-chosen form runs it
    table(_entry())
    assert _form("small", call(seqlen_k=513)) is None and _form("small", call(seqlen_k=512)) == SMALL_FORM
    # and where it would take more blocks than are allowed
    assert small.refused_by(small.hand_chosen(call(heads=32), "sm_90a", 132), call(heads=32)) is None
    assert _form("small", call(heads=32)) is None and _form("small", call(heads=16)) == SMALL_FORM


def test_no_call_that_has_no_size_is_near_an_entry(table: Callable, make_spec: Callable) -> None:
    table(_entry("portable"))
    for sizes in ({"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}):
        assert tuned.find("portable", make_spec(**sizes), "sm_90a", 132) is None


def test_a_table_is_for_its_arch_and_number_of_multiprocessors(table: Callable, call: Callable) -> None:
    table(_entry("portable"))
    assert _form("portable", call()) == PORTABLE_FORM
    assert _form("portable", call(), sm_count=114) is None
    assert _form("portable", call(), arch="sm_89", sm_count=58) is None
    table(_entry("portable"), arch="sm_100a")
    assert _form("portable", call()) is None


@pytest.mark.parametrize("impl", FORMS)
def test_a_stale_entry_is_ignored(impl: str, table: Callable, call: Callable) -> None:
    table(_entry(impl, source_sha256="0" * 64))
    assert _form(impl, call()) is None
    assert not any(True for _ in tuned.configs(impl, _entry(impl).features, torch.float16, "sm_90a"))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            _entry(config={**SMALL_FORM, "keys": 64}),
            r"b1h8s512d64: config: got SmallConfig\(cluster=4, keys=64.*allowed: one that",
        ),
        (_entry(config={**SMALL_FORM, "keys": 96}), "config: got SmallConfig"),
        (_entry(config={**SMALL_FORM, "cluster": 3}), "cluster: got 3; allowed: 1, 2, 4"),
        (_entry(config={"cluster": 4}), "config: got cluster; allowed: exactly cluster, keys, block_n"),
        (_entry("hopper", config={**HOPPER_FORM, "q_registers": True, "o_shares_q": True}), "config: got HopperConfig"),
        (_entry("portable", config={**PORTABLE_FORM, "block_n": 256, "num_stages": 4}), "config: got PortableConfig"),
        (_entry(features="d128-none"), "features: got d128-none; allowed: the problem's, d64-none"),
        (_entry().model_copy(update={"problem": _entry().problem.model_copy(update={"mask": "bool"})}), "takes no mask"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused_when_it_is_read(
    entry: Entry, words: str, table: Callable, call: Callable, h200: Target
) -> None:
    table(entry)
    impl = entry.problem.impl
    for ask in (
        lambda: BINDINGS[impl].specialise_call(call(), "sm_90a", 132),
        lambda: BINDINGS[impl].shipped("sm_90a"),
        lambda: make_plan(call(), h200, impl),
    ):
        with pytest.raises(ArgumentValueError, match=rf"nvidia-h200\.json: entry {impl}-fp16-.*{words}"):
            ask()


@pytest.mark.parametrize("text", ["{", '{"kind": "tuned"}', '{"kind": "other", "schema_version": 1}'])
def test_a_damaged_table_is_refused(text: str, tuned_folder: Path, call: Callable) -> None:
    (tuned_folder / "nvidia-h200.json").write_text(text)
    tuned.forget()
    with pytest.raises(ArgumentValueError, match=r"nvidia-h200\.json"):
        small.specialise_call(call(), "sm_90a", 132)


@pytest.mark.parametrize("changes", [{"ratio": None}, {"sha256": {"fp16": "1" * 64}}, {"config": None}])
def test_half_an_entry_is_none(changes: dict) -> None:
    fields = {**_entry().model_dump(), **changes}
    with pytest.raises(ValueError, match="a config comes with its ratio"):
        Entry(**fields)


@pytest.mark.parametrize("impl", FORMS)
def test_a_wheel_holds_what_is_tuned_in_both_half_dtypes(impl: str, table: Callable, call: Callable) -> None:
    binding = BINDINGS[impl]
    before = binding.shipped("sm_90a")
    table(_entry(impl), _entry(impl, causal=True), _entry(impl, heads=16, heads_k=16))
    added = [one for one in binding.shipped("sm_90a") if one not in before]
    calls = [call(dtype=dtype, causal=causal) for dtype in (torch.float16, torch.bfloat16) for causal in (False, True)]
    assert set(added) == {binding.specialise_call(spec, "sm_90a", 132) for spec in calls} and len(added) == 4
    assert binding.shipped("sm_90a")[: len(before)] != added and set(before) < set(binding.shipped("sm_90a"))
    assert binding.shipped("sm_89") == SEARCHABLE[impl].binding.shipped("sm_89")


def test_single_precision_has_entries_of_its_own(table: Callable, call: Callable) -> None:
    spec, half = call(dtype=torch.float32), call(head_dim=40)
    assert portable.features(spec) == portable.features(half) == "d64partial-window"
    form = {**PORTABLE_FORM, "block_m": 16}
    table(_entry("portable", config=form, dtype="fp32", sha256={"fp32": "1" * 64}))
    assert dict(portable.specialise_call(spec, "sm_90a", 132).constants)["BLOCK_M"] == 16
    assert _form("portable", half) is None


def test_a_masks_dtype_is_no_feature_where_it_is_the_inputs_own(make_spec: Callable) -> None:
    def features(dtype: torch.dtype, mask: torch.dtype) -> str:
        return portable.features(make_spec(dtype=dtype, mask=torch.zeros(128, 128, dtype=mask)))

    assert features(torch.float16, torch.float16) == features(torch.bfloat16, torch.bfloat16)
    assert (
        features(torch.float16, torch.float32) == features(torch.bfloat16, torch.float32) != features(torch.float16, torch.bool)
    )
    assert hopper.features(make_spec(dtype=torch.bfloat16, softcap=3.0)) == "d64-window-softcap"


def test_a_plan_says_where_its_form_comes_from(
    table: Callable, call: Callable, h200: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = store.Location("shipped", SimpleNamespace(sha256="5" * 64), Path("somewhere.cubin"))
    monkeypatch.setattr(store, "locate", lambda specialisation, arch: location)
    hand = "form        hand-chosen: nothing near this call was searched"
    assert hand in str(make_plan(call(), h200, "small")).splitlines()
    table(_entry(), _hand_chosen(problem=_entry(heads=16, heads_k=16).problem))
    tuned_line = (
        "form        tuned: from search search-x.json, 1.100 (1.050 to 1.150) times as fast as the hand-chosen form at "
        "small-fp16-b1h8s512d64"
    )
    found = make_plan(call(), h200, "small")
    assert tuned_line in str(found).splitlines() and found.specialisation.name.endswith("-c4k128n64")
    stands = "form        hand-chosen: from search search-x.json, none of 9 measured forms is faster beyond noise"
    assert stands in str(make_plan(call(heads=16), h200, "small")).splitlines()
    assert hand in str(make_plan(call(heads=64, length=128), h200, "small")).splitlines()
    assert plan.Plan("torch", "why").form is None and "form" not in str(make_plan(call(), h200, "torch"))


def _index(*verified: str) -> Index:
    fields = {"gpu": "NVIDIA H200", "arch": "sm_90a", "sources": {}, "peaks": None, "timings": []}
    return Index(**fields, verified={sha256: ("any", 1) for sha256 in verified})


def _built(*sha256: str) -> BuiltSet:
    return BuiltSet("sm_90a", tuple(SimpleNamespace(info=SimpleNamespace(sha256=one)) for one in sha256), {})


def test_what_is_unproved_of_a_table_is_named(table: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promote, "unfounded", lambda entry, folder: None)
    half, both = ("1" * 64,), tuple(SHA256.values())
    table(_entry(), _hand_chosen(problem=_entry(heads=16, heads_k=16).problem))
    assert unproved_entries(_index(*both), _built(*both)) == []
    name = "nvidia-h200.json: small-fp16-b1h8s512d64"
    assert unproved_entries(_index(*half), _built(*both)) == [
        f"{name}: its bf16 binary {'2' * 64} is not among those verified on NVIDIA H200"
    ]
    assert unproved_entries(_index(*both), _built(*half)) == [
        f"{name}: its bf16 binary {'2' * 64} is not among those that are built"
    ]
    # what was not to be built may be shipped all the same
    assert unproved_entries(_index(*both), _built(*half), whole=False) == []
    monkeypatch.setattr(promote, "unfounded", lambda entry, folder: f"no record in {folder.name}")
    assert unproved_entries(_index(*both), _built(*both)) == [
        f"{name}: its records do not bear it out: no record in nvidia-h200",
        "nvidia-h200.json: small-fp16-b1h16s512d64: its records do not bear it out: no record in nvidia-h200",
    ]
    table(_entry(source_sha256="0" * 64))
    assert unproved_entries(_index(*both), _built(*both)) == [
        f"{name}: is stale, and ignored: its kernel's source changed since the search"
    ]
    table(_entry(), gpu="NVIDIA H100")
    assert unproved_entries(_index(), _built()) == []  # of another GPU: that one's evidence is asked


@pytest.mark.parametrize(
    ("entry", "gpu", "words"),
    [
        (_entry(source_sha256="0" * 64), "NVIDIA H200", "is stale, and ignored"),
        (_entry(), "NVIDIA H200", "is not among those verified on NVIDIA H200"),
        (_entry(), "NVIDIA H100", "there is no evidence of NVIDIA H100"),
    ],
)
def test_the_evidence_check_fails_for_what_is_stale_or_unverified(
    entry: Entry, gpu: str, words: str, table: Callable, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashcore import documents
    from flashcore.cli import building

    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    (folder / "index.json").write_text(_index().model_dump_json(indent=1) + "\n")
    monkeypatch.setattr(build, "folders", lambda: [folder])
    monkeypatch.setattr(build, "make_index", lambda folder: _index())
    monkeypatch.setattr(build, "unproved", lambda index, built: [])
    monkeypatch.setattr(building, "build_with_progress", lambda arch, only: _built())
    monkeypatch.setattr(documents, "render_all", dict)
    table()
    assert run("evidence", "--check")[:2] == (0, "the evidence holds\n")
    table(entry, gpu=gpu)
    code, output, _ = run("evidence", "--check")
    assert code == 1 and words in output.replace("\n", " ")


def test_the_tables_of_the_package_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "FOLDER", Path(tuned.__file__).parent)
    tuned.forget()
    assert [path.name for path in tuned.tables()] == ["nvidia-h200.json"]
    (table,) = tuned.tables().values()
    assert (table.gpu, table.arch, table.sm_count) == ("NVIDIA H200", "sm_90a", 132)
    for impl in FORMS:
        assert BINDINGS[impl].shipped("sm_90a")
