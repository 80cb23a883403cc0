"""The tables of a report, for the terminal and the documents."""

from __future__ import annotations

from flashcore.bench.markdown import view_to_markdown
from flashcore.bench.view import EMPTY, View, figure
from flashcore.search.kernels import SEARCHABLE
from flashcore.search.report import NEAR, PART, Comparison, Curves, Found, SearchReport, form_name
from flashcore.sources import kernel_hash

_VERDICTS = ("measured", "same binary", "breaks a limit", "compiler failed", "wrong", "hang", "crash", "built")


def views(report: SearchReport) -> list[View]:
    """What was found, what became of the candidates, and how the samplers compare where a search was exhaustive."""
    compared = [(one, one.compared) for one in report.searches if one.compared is not None]
    return [_best(report), _verdicts(report), *([_samplers(report, compared)] if compared else [])]


def to_markdown(report: SearchReport, place: str) -> str:
    """The same for a document in docs/notes, with the picture that goes with it. place: where the report lies."""
    picture = "" if report.plot is None else f"![The best found so far, by evaluations](../img/{report.plot})\n\n"
    tables = "\n".join(map(view_to_markdown, views(report)))
    dirty = " and changes" if report.git_dirty else ""
    judged = dict.fromkeys(
        f"{one.gpu}, driver {one.driver}, CUDA {one.cuda}, torch {one.torch}"
        for found in report.searches
        for one in found.visits
    )
    origins = [
        f"`{place}`: {report.time[:10]}, commit {report.git_sha[:12]}{dirty}",
        f"judged on {'; '.join(judged) or 'no GPU'}",
    ]
    origins.append(f"made from {', '.join(f'`{one.artifact}`' for one in report.searches)}")
    return picture + tables + "".join(f"\n- {one}" for one in origins)


def _best(report: SearchReport) -> View:
    rows = []
    for one in report.searches:
        impl, best = one.problem.impl, one.best
        start = (one.problem.name, f"{one.sampler} {one.evaluations} of {one.fitting}", form_name(impl, one.incumbent))
        if best is None:
            rows.append((*start, *(EMPTY,) * 5))
            continue
        sdpa = EMPTY if best.sdpa_us is None else f"{best.sdpa_us / best.us:.3f}"
        rows.append(
            (
                *start,
                form_name(impl, best.config),
                figure(best.incumbent_us),
                figure(best.us),
                f"{best.ratio:.3f} ({best.ratio_low:.3f}-{best.ratio_high:.3f})",
                sdpa,
            )
        )
    columns = ("problem", "search", "hand-chosen", "best found", "hand-chosen us", "best us", "x hand-chosen", "x SDPA")
    gpus = sorted({gpu for one in report.searches for gpu in one.gpus})
    notes = [
        "x: the other's time over the best's, medians of the same rounds, with a 95 % bootstrap interval; SDPA is its fastest "
        "backend. The best of many noisy times is too good by its selection: a retest says what of it holds"
    ]
    stale = sorted({one.problem.impl for one in report.searches if _stale(one)})
    notes += [f"**before the present source of {', '.join(stale)}**"] if stale else []
    return View(f"what searches found on {', '.join(gpus) or 'no GPU'}", columns, tuple(rows), tuple(notes))


def _stale(one: Found) -> bool:
    return one.source_sha256 != kernel_hash(SEARCHABLE[one.problem.impl].binding.KERNEL)


def _verdicts(report: SearchReport) -> View:
    seen = [verdict for verdict in _VERDICTS if any(verdict in one.verdicts for one in report.searches)]
    rows = tuple(
        (one.problem.name, f"{one.sampler} {one.seed}", *(str(one.verdicts.get(verdict, 0)) for verdict in seen))
        for one in report.searches
    )
    names = tuple("not judged yet" if verdict == "built" else verdict for verdict in seen)
    return View("what became of the candidates", ("problem", "sampler, seed", *names), rows)


def _samplers(report: SearchReport, compared: list[tuple[Found, Comparison]]) -> View:
    rows = tuple(
        (
            one.problem.name,
            str(one.fitting),
            str(comparison.budget),
            f"{comparison.optimum:.3f}",
            *(cell for curves in comparison.curves for cell in _sampler(curves, comparison)),
        )
        for one, comparison in compared
    )
    names = tuple(curves.sampler for curves in compared[0][1].curves)
    each = tuple(
        f"{name}: {what}" for name in names for what in (f"evaluations to {NEAR:.0%}", "seeds that got there", "of optimum")
    )
    notes = (
        f"{report.seeds} seeds each, over the times that the exhaustive search measured; budget: 1/{PART} of its evaluations",
        f"evaluations to {NEAR:.0%} of the optimum: the median over the seeds; of optimum: what was reached with the budget, "
        "median (10th to 90th percentile) over the seeds",
    )
    return View("samplers against an exhaustive search", ("problem", "points", "budget", "optimum", *each), rows, notes)


def _sampler(curves: Curves, comparison: Comparison) -> tuple[str, str, str]:
    share = [curve[-1] / comparison.optimum for curve in (curves.middle, curves.low, curves.high)]
    typical = f"over {comparison.budget}" if curves.typical is None else f"{curves.typical:g}"
    return typical, f"{curves.share:.0%}", f"{share[0]:.1%} ({share[1]:.1%}-{share[2]:.1%})"
