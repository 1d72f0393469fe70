"""Try one case and judge it: break a run as the case says, resume it until it is done, compare."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dschat.train.line_files import KEPT as KEPT_LINES
from tests.faults import in_process, judge
from tests.faults.bench import KEPT, Bench, Workplace
from tests.faults.cases import Case
from tests.faults.damages import break_file, put
from tests.faults.library import Aim
from tests.faults.runs import Outcome, Pause
from tests.faults.sites import draw_site, in_loop

STOPPED = 75  # exit code of a run that a signal has stopped
REFUSED = 2


@dataclass
class Verdict:
    """What a case has come to.

    Attributes:
        result: one word for the table. faults: of them that took place. at: where, for people.
        complaints: none where all is well. sweep: files, and damages by what came of them.
    """

    case: str
    result: str = ""
    faults: int = 0
    starts: int = 0
    at: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    sweep: dict[str, int] = field(default_factory=dict)


def try_case(case: Case, bench: Bench) -> Verdict:
    """Run a case; its folder stays where there is a complaint."""
    verdict = Verdict(case.name)
    place = KINDS[case.kind](case, bench, verdict)
    verdict.starts = len(place.outcomes)
    if not verdict.complaints:
        place.remove()
    else:
        verdict.complaints.append(f"see {place.folder.parent}")
    return verdict


def _finish(case: Case, bench: Bench, place: Workplace, verdict: Verdict) -> Outcome:
    """Start once more, with nothing in its way, and compare what it comes to."""
    saved = place.saved
    outcome = place.start(case.layout.saving(KEPT))
    verdict.complaints += judge.spoken(outcome, {0})
    if not any(outcome.codes):
        verdict.complaints += judge.went_back(outcome, saved)
        reference = bench.reference(case.layout).results
        verdict.complaints += judge.finished(place.folder, reference)
    return outcome


def kill(case: Case, bench: Bench, verdict: Verdict) -> Workplace:
    """SIGKILL up to three starts: before a call, after half of it, or by the clock."""
    draw, reference = case.random(), bench.reference(case.layout)
    place = bench.fresh(case.layout, case.name)
    for _ in range(draw.randint(1, 3)):
        saved = place.saved
        if draw.random() < 0.25:
            pause = Pause(draw.randrange(reference.trace_bytes), draw.expovariate(10))
            options = {"kill_after": pause}
            at = f"{pause.seconds:.3f} s after {pause.trace_bytes} bytes of trace"
        else:
            aim = _aim(draw, draw.choice(("kill", "torn")), reference.sites)
            options = {"aim": aim}
            at = f"{aim.action} {aim.pattern} #{aim.at}"
        outcome = place.start(case.layout.saving(KEPT), **options)
        if not outcome.killed:  # the call did not come again, or the run was done sooner
            verdict.complaints += judge.spoken(outcome, {0})
            break
        verdict.faults += 1
        verdict.at.append(at)
        if reference.older:
            models = (reference.older, reference.results.files)
            verdict.complaints += judge.mixture(place.output, models)
        if judge.RESUMED.search(outcome.stdout):
            verdict.complaints += judge.went_back(outcome, saved)
    _finish(case, bench, place, verdict)
    verdict.result = "bit for bit" if not verdict.complaints else "failed"
    return place


def _aim(draw: random.Random, action: str, sites: dict[str, int], value: int = 0) -> Aim:
    site, at = draw_site(draw, sites)
    return Aim(action, site, at, value)


def error(case: Case, bench: Bench, verdict: Verdict) -> Workplace:
    """Let every call fail from one on, as on a full or broken disk; then resume without."""
    draw, reference = case.random(), bench.reference(case.layout)
    place = bench.fresh(case.layout, case.name)
    aim = _aim(draw, "error", reference.sites, case.value)
    outcome = place.start(case.layout.saving(KEPT), aim=aim)
    verdict.faults = int(outcome.fired)
    verdict.at.append(f"{aim.pattern} #{aim.at}")
    done = not any(outcome.codes)  # nothing that mattered was left to be written
    verdict.complaints += judge.spoken(outcome, {0} if done else {REFUSED})
    _finish(case, bench, place, verdict)
    verdict.result = "one line" if not done else "not met"
    return place


def stop(case: Case, bench: Bench, verdict: Verdict) -> Workplace:
    """Send a signal amid a call, to all ranks or to one; then resume."""
    draw, reference = case.random(), bench.reference(case.layout)
    place = bench.fresh(case.layout, case.name)
    action = "signal one rank" if case.kind == "signal-one" else "signal"
    sites = in_loop(reference.sites) if draw.random() < 0.75 else reference.sites
    aim = _aim(draw, action, sites, case.value)
    outcome = place.start(case.layout.saving(KEPT), aim=aim)
    verdict.faults = int(outcome.fired)
    verdict.at.append(f"{aim.pattern} #{aim.at}")
    done = not any(outcome.codes)
    verdict.complaints += judge.spoken(outcome, {0} if done else {STOPPED})
    _finish(case, bench, place, verdict)
    verdict.result = "exit 75" if not done else "was done"
    return place


def lost_rank(case: Case, bench: Bench, verdict: Verdict) -> Workplace:
    """SIGKILL one of two ranks; the other must end by itself, in a line."""
    draw, reference = case.random(), bench.reference(case.layout)
    place = bench.fresh(case.layout, case.name)
    aim = _aim(draw, "signal one rank", reference.sites, int(signal.SIGKILL))
    outcome = place.start(case.layout.saving(KEPT), aim=aim)
    verdict.faults = int(outcome.fired)
    verdict.at.append(f"{aim.pattern} #{aim.at}")
    survivors = [code for code in outcome.codes if code != -signal.SIGKILL]
    verdict.complaints += judge.spoken(outcome, {-signal.SIGKILL, *survivors})
    if outcome.fired and 0 in survivors:
        verdict.complaints.append(f"a rank is lost, and the exit codes are {outcome.codes}")
    _finish(case, bench, place, verdict)
    verdict.result = "ended" if outcome.fired else "not met"
    return place


def damage(case: Case, bench: Bench, verdict: Verdict) -> Workplace:
    """Change one file between two starts; nothing but the same results, or a line that names it."""
    target, how, name = case.words
    place = bench.copy(case.layout, case.name, bench.stopped(case.layout))
    if target == "only-checkpoint":
        place.remove_older()
    (path,) = place.folder.glob(name)
    break_file(path, how)
    verdict.faults = 1
    expected = _in_process(case, bench, place, path)
    outcome = place.start(case.layout.saving(KEPT))
    verdict.complaints += judge.spoken(outcome, {0, REFUSED})
    shown = outcome.stdout + outcome.stderr
    named = path.name in shown
    is_found = named or any(outcome.codes)
    if expected is not None and is_found != (expected == in_process.FOUND):
        verdict.complaints.append(f"in one process it is {expected}, in a start otherwise")
    if any(outcome.codes):
        verdict.result = "refused"
        if not named and path.parent.name not in "".join(judge.error_lines(outcome)):
            verdict.complaints.append(f"{path.name} is not named: {judge.error_lines(outcome)}")
        if target in ("checkpoint", "cache"):
            verdict.complaints.append(f"refused: {judge.error_lines(outcome)}")
        return place
    mended = {"cache": "made again", "output": "set aside"}.get(target, "older one taken")
    verdict.result = mended if named else "same results"
    reference = bench.reference(case.layout).results
    differences = judge.finished(place.folder, reference)
    if differences and not named:
        verdict.result = "undetected"
    verdict.complaints += differences
    return place


def _in_process(case: Case, bench: Bench, place: Workplace, path: Path) -> str | None:
    """Ask the functions alone what a resume makes of a damage, on a copy; None: not told."""
    target = case.words[0].removeprefix("only-")
    copy, name = place.folder.with_name("judged"), path.relative_to(place.folder)
    shutil.copytree(place.folder, copy, symlinks=True)
    put(copy / name, (bench.stopped(case.layout) / name).read_bytes())
    for part in in_process.places(target, copy, case.layout, copy.with_name("kept")):
        if copy / name in part.files:
            put(copy / name, path.read_bytes() if path.exists() else None)
            return in_process.judged(part, copy / name)
    return None


def every_file(case: Case, bench: Bench, verdict: Verdict) -> Workplace:
    """Damage every file of a target in every way, and ask the functions that a resume calls."""
    place = bench.copy(case.layout, case.name, bench.stopped(case.layout))
    verdict.sweep = {"files": 0}
    kept = place.folder.with_name("kept")
    for part in in_process.places(case.words[0], place.folder, case.layout, kept):
        found = in_process.sweep(part)
        verdict.complaints += found.complaints
        for name, count in {"files": found.files, **found.outcomes}.items():
            verdict.sweep[name] = verdict.sweep.get(name, 0) + count
    verdict.faults = sum(verdict.sweep.values()) - verdict.sweep["files"]
    verdict.result = "each found" if not verdict.complaints else "failed"
    return place


KINDS: dict[str, Callable[[Case, Bench, Verdict], Workplace]] = {
    "kill": kill,
    "error": error,
    "signal": stop,
    "signal-one": stop,
    "lost-rank": lost_rank,
    "damage": damage,
    "every-file": every_file,
}


def files_of(case: Case, bench: Bench) -> list[str]:
    """Files that a damage case named `all` stands for, as patterns below the run's folder."""
    folder = bench.stopped(case.layout)
    if case.words[0] == "output":
        return [f"out/{name}" for name in KEPT_LINES if (folder / "out" / name).is_file()]
    if case.words[0] == "model":
        roots = [folder / name for name in case.layout.record.models]
    elif case.words[0] == "cache":
        roots = [folder / "cache"]
    else:
        steps = 2 * case.layout.record.save_steps
        roots = [folder / f"out/checkpoints/step-{steps:06d}"]
    files = (p for root in roots for p in root.rglob("*") if p.is_file() and p.stat().st_size)
    return sorted(str(p.relative_to(folder)) for p in files)


def expand(case: Case, bench: Bench) -> list[Case]:
    """A case, or one for each file where it says `all`."""
    if case.words[-1:] != ("all",):
        return [case]
    words = case.words[:-1]
    return [Case(case.layout, case.kind, (*words, name)) for name in files_of(case, bench)]
