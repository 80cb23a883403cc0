"""Cases for what a search found (flashcore.tuned). A tuned form runs only near its entry's sizes, and there the hand-chosen
form does not, so that neither can be left to the cases of other suites."""

from __future__ import annotations

import math
from itertools import product

import torch

from flashcore import tuned
from flashcore.bench.shapes import DTYPES
from flashcore.errors import ArgumentValueError
from flashcore.search.kernels import SEARCHABLE
from flashcore.search.schema import Problem
from flashcore.tuned import Entry, Table
from flashcore.verify.cases import Case, MaskCase
from flashcore.verify.shipped_cases import GIB

# An entry's lengths divided: far enough to be cheap, and near enough to be its own (tuned.REACH).
DIVISORS = ((7.0, 1.1), (2.7, 2.7), (1.1, 7.0))
# Sizes among which each hand-chosen form is to be met away from the entries: few heads and many, short lengths and long.
HEADS = (1, 6, 36, 288)
QUERIES = (33, 197, 577, 1023)
KEYS = (33, 67, 131, 333, 577, 2111)
# Scores of a case that Triton's interpreter still does in seconds; those with more are for GPUs only.
INTERPRETED_SCORES = 2**20


def tuned_cases() -> list[Case]:
    """For each entry sizes near it, and for each hand-chosen form of its features the cheapest that is near none, in each
    dtype; none where nothing is tuned."""
    cases: dict[str, Case] = {}
    for table in tuned.tables().values():
        entries = [entry for entry in table.entries if entry.config is not None and not entry.stale]
        # the forms of a dtype are those of the other
        features = {(entry.problem.impl, entry.features, entry.precision): entry for entry in entries}
        problems = [problem for entry in entries for problem in _near(entry, table)]
        problems += [problem for entry in features.values() for problem in _apart(entry, table)]
        for problem in problems:
            for dtype in tuned.DTYPES[tuned.precision(problem)]:
                case = _case(problem.model_copy(update={"dtype": dtype}))
                cases[case.name] = case
    return list(cases.values())


def _near(entry: Entry, table: Table) -> list[Problem]:
    """Problems that take the entry's form; its own, where another entry is nearer to all smaller ones."""
    searched, found = entry.problem, []
    for rows, keys in DIVISORS:
        sizes = {"seqlen_q": int(searched.seqlen_q / rows) | 1, "seqlen_k": int(searched.seqlen_k / keys) | 1}
        shared = searched.heads // 2 if rows == keys and searched.heads % 2 == 0 else searched.heads_k
        problem = searched.model_copy(update={**sizes, "heads_k": shared})
        if _entry_of(problem, table) == entry:
            found.append(problem)
    return found or [searched]


def _apart(entry: Entry, table: Table) -> list[Problem]:
    """The cheapest problem of the entry's features for each hand-chosen form."""
    searchable = SEARCHABLE[entry.problem.impl]
    found: dict[object, Problem] = {}
    for heads, rows, keys in sorted(product(HEADS, QUERIES, KEYS), key=math.prod):
        sizes = {"batch": max(1, heads // 36), "heads": min(heads, 36), "heads_k": min(heads, 36)}
        problem = entry.problem.model_copy(update={**sizes, "seqlen_q": rows, "seqlen_k": keys})
        try:
            spec = searchable.spec(problem)
        except ArgumentValueError:
            continue  # the kernel does not take it
        alike = searchable.binding.features(spec) == entry.features
        if alike and tuned.config(problem.impl, spec, table.arch, table.sm_count) is None:
            found.setdefault(searchable.form.hand_chosen(spec, table.sm_count), problem)
    return list(found.values())


def _entry_of(problem: Problem, table: Table) -> Entry | None:
    searchable = SEARCHABLE[problem.impl]
    try:
        found = tuned.find(problem.impl, searchable.spec(problem), table.arch, table.sm_count)
    except ArgumentValueError:
        return None  # the kernel does not take it
    return None if found is None else found.entry


def _case(problem: Problem) -> Case:
    dtype = getattr(torch, DTYPES[problem.dtype])
    masks = {"none": None, "bool": MaskCase("bool_empty_rows"), "additive": MaskCase("add_empty_rows", dtype=dtype)}
    scores = problem.batch * problem.heads * problem.seqlen_q * problem.seqlen_k
    return Case(
        name=f"tuned-{problem.name}",
        batch=problem.batch,
        heads_q=problem.heads,
        heads_k=problem.heads_k,
        seqlen_q=problem.seqlen_q,
        seqlen_k=problem.seqlen_k,
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        dtype=dtype,
        causal=problem.causal,
        window=problem.window,
        softcap=problem.softcap,
        mask=masks[problem.mask],
        storage="padded",
        needs_bytes=0 if scores <= INTERPRETED_SCORES else 8 * GIB,
    )
