"""All that the watch knows: a function of its records, in their order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from .across import Across, Template
from .benign import usual
from .buckets import HOUR, Buckets, Sums
from .features import Figures, figures
from .observation import ALL, Outcome, party, subjects
from .ramp import Standing
from .recent import Recent
from .records import Admitted, Record, Reset
from .score import Scored, scored
from .settings import WatchSettings


@dataclass
class Subject:
    """A key, an end user, an owner, or all of them.

    Attributes:
        name: as in `subjects`.
        owner: of the key; "" for what has none.
        recent: its latest sketches.
        buckets: its sums.
        standing: on the ramp.
        time: of its last request, seconds since 1970.
        evaluation: policy declares the key as an evaluation loop.
    """

    name: str
    owner: str
    recent: Recent
    buckets: Buckets = field(default_factory=Buckets)
    standing: Standing = field(default_factory=Standing)
    time: float = 0.0
    evaluation: bool = False

    def admitted(self, record: Admitted) -> None:
        """Counts a request."""
        gap = min(record.time - self.time, float(HOUR)) if self.time and record.time > self.time else 0.0
        self.buckets.add(
            record.time,
            requests=1,
            prompt_tokens=record.prompt_tokens,
            reasoning=record.reasoning,
            cool=record.cool,
            gaps=gap > 0,
            gap=gap,
            gap2=gap**2,
        )
        self.recent.add(record.time, record.sketch)
        self.time = max(self.time, record.time)

    def finished(self, outcome: Outcome, long_answer: int) -> None:
        """Counts an answer."""
        self.buckets.add(
            outcome.time,
            finished=1,
            prompt_tokens=outcome.prompt_tokens,
            completion_tokens=outcome.completion_tokens,
            long=outcome.completion_tokens >= long_answer,
            rows=outcome.n_rows,
            choices=outcome.n_choices,
            dose=outcome.dose,
        )

    def figures(self, now: float, window: int) -> tuple[Figures, Sums]:
        """Its features in a window, and the sums that they come from."""
        sums = self.buckets.total(now, window)
        return figures(sums, self.recent.forms(now, window)), sums


class State:
    """Subjects and templates, bounded by `settings.capacity`."""

    def __init__(self, settings: WatchSettings) -> None:
        self.settings = settings
        self.subjects: OrderedDict[str, Subject] = OrderedDict()
        self.across = Across(settings.across, settings.capacity)
        self._usual = {window: usual(window, settings.baseline) for window in settings.windows}

    def apply(self, record: Record) -> Template | None:
        """Takes a record in; returns the template of an admitted request that counts across keys."""
        if isinstance(record, Reset):
            self.forget(record.subject)
            return None
        if isinstance(record, Outcome):
            for subject in self._counted(record.key, record.owner, record.user, None):
                subject.finished(record, self.settings.long_answer)
            return None
        for subject in self._counted(record.key, record.owner, record.user, record.evaluation):
            subject.admitted(record)
        if record.evaluation:
            return None
        return self.across.add(record.time, party(record.key, record.user), record.sketch, record.reasoning)

    def restore(self, record: Record) -> None:
        """Takes in a record that was judged already, here or elsewhere, and where that left its subjects."""
        template = self.apply(record)
        if not isinstance(record, Admitted):
            return
        for name, standing in self.standings(record, template).items():
            standing.position, standing.time = record.positions.get(name, 0.0), record.time

    def standings(self, record: Admitted, template: Template | None) -> dict[str, Standing]:
        """By name, where everything stands whose score decides about a request.

        Of a front end that names its end users the user alone, since key and owner stand for many.
        """
        names = [party(record.key, record.user)]
        if record.user is None and not record.evaluation:
            names.append(f"owner:{record.owner}")
        found = {name: self.subjects[name].standing for name in names}
        return found if template is None else {**found, template.name: template.standing}

    def score(self, subject: Subject, now: float) -> Scored:
        """The window of the highest score, one with enough signals before any other."""
        found = []
        for window in self.settings.windows:
            values, sums = subject.figures(now, window)
            found.append(scored(window, values, sums["requests"], self._usual[window]))
        agreed = self.settings.ramp.agreed
        return max(found, key=lambda each: (agreed(each), each.score))

    def forget(self, subject: str) -> None:
        """As if it had never asked; for a template, as if nobody had used it."""
        self.subjects.pop(subject, None)
        template = self.across.named(subject)
        if template is not None:
            template.forget()

    def _counted(self, key: str, owner: str, user: str | None, evaluation: bool | None) -> Iterator[Subject]:
        """The subjects that a request counts for; an evaluation loop's owner is not charged with it."""
        direct = self._subject(f"key:{key}", owner)
        if evaluation is not None:
            direct.evaluation = evaluation
        for name in subjects(key, owner, user):
            if not (direct.evaluation and name.startswith("owner:")):
                found = direct if name == direct.name else self._subject(name, "" if name == ALL else owner)
                found.evaluation = direct.evaluation and name != ALL
                yield found

    def _subject(self, name: str, owner: str) -> Subject:
        found = self.subjects.get(name)
        if found is None:
            found = self.subjects[name] = Subject(name, owner, Recent(self.settings.capacity.sketches))
        self.subjects.move_to_end(name)
        while len(self.subjects) > self.settings.capacity.subjects:
            self.subjects.popitem(last=False)
        return found
