"""Numbers and what may be said of them: spread, paired differences, and how sure a test set of this size can be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

MISSING, MINUS, SPACE = "\u2013", "\u2212", "\u00a0"
# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom; beyond the table 2.0.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation; None of a single value."""
    return stdev(values) if len(values) > 1 else None


def shown(values: Sequence[float], digits: int = 1) -> str:
    """``91.3``, or ``91.3 ± 0.8 (5)``: mean, standard deviation, number of seeds."""
    if not values:
        return MISSING
    mean, sd = f"{fmean(values):.{digits}f}", spread(values)
    return mean if sd is None else f"{mean} ± {sd:.{digits}f} ({len(values)})"


def average(values: Sequence[float], form: str = "{:,.0f}") -> str:
    return form.format(fmean(values)) if values else MISSING


def compact(value: float) -> str:
    """``12.3 G``: three digits and a prefix (k, M, G, T, P)."""
    if value < 1000:
        return f"{value:.0f}"
    for prefix in "kMGTPE":
        value /= 1000
        if value < 999.5 or prefix == "E":
            break
    return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {prefix}"


def binomial_se(score: float, images: int) -> float:
    """Standard error, in points, of ``score`` percent measured on ``images`` independent test images."""
    share = min(max(score / 100, 0.0), 1.0)
    return 100 * math.sqrt(share * (1 - share) / images) if images else 0.0


@dataclass(frozen=True)
class Paired:
    """The difference of two arms, seed by seed, in the score's own unit (points of a percentage)."""

    differences: tuple[float, ...]
    noise: float | None = None  # standard error of one difference from the test set's size alone; None: not known
    is_low_better: bool = False  # whether a negative difference is good news
    digits: int = 1  # behind the point, where it is printed

    @property
    def mean(self) -> float:
        return fmean(self.differences)

    @property
    def above(self) -> int:
        return sum(d > 0 for d in self.differences)

    def half_width(self) -> float | None:
        """Of the 95 % interval of the mean over seeds; None of a single seed."""
        n, sd = len(self.differences), spread(self.differences)
        if sd is None:
            return None
        return (T95[n - 2] if n - 2 < len(T95) else 2.0) * sd / math.sqrt(n)

    def shown(self) -> str:
        sd = spread(self.differences)
        digits = self.digits
        return signed(self.mean, digits) + ("" if sd is None else f" ± {sd:.{digits}f} ({len(self.differences)})")

    def word(self) -> str:
        """The reading in two or three words."""
        half = self.half_width()
        if half is not None:
            is_better = (self.mean > 0) != self.is_low_better
            return "not told apart" if abs(self.mean) <= half else "better" if is_better else "worse"
        if self.mean == 0:
            return "equal"
        side = "higher" if self.mean > 0 else "lower"
        if self.noise is None:
            return side
        return f"{side}, {'within' if abs(self.mean) < 2 * self.noise else 'beyond'} the noise"

    def reading(self) -> str:
        """What this difference allows one to say."""
        half = self.half_width()
        if half is None:
            return f"{self.word()}{' of the test set' if self.mean and self.noise is not None else ''}; one seed"
        seeds = f"higher in {self.above} of {len(self.differences)} seeds"
        low, high = (signed(end, self.digits) for end in (self.mean - half, self.mean + half))
        return f"{self.word()}: {seeds}; 95 % interval {low} to {high}"


def signed(value: float, digits: int = 1) -> str:
    """``+0.9``, with a true minus sign."""
    return f"{value:+.{digits}f}".replace("-", MINUS)


def paired(
    ours: Mapping[int, float],
    other: Mapping[int, float],
    test_images: int,
    is_low_better: bool = False,
    digits: int = 1,
) -> Paired | None:
    """``ours`` minus ``other`` over the seeds both have; None if they share none.

    The noise takes the two scores as independent. They share their test images, so it is on the careful side. It is
    not known without a number of test images, nor for a score that is no share of them (0).
    """
    seeds = sorted(ours.keys() & other.keys())
    if not seeds:
        return None
    errors = [binomial_se(fmean(side.values()), test_images) for side in (ours, other)]
    noise = math.hypot(*errors) if test_images else None
    return Paired(tuple(ours[s] - other[s] for s in seeds), noise, is_low_better, digits)


def listed(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def sentence(text: str) -> str:
    """The first letter large, the others as they are; a word like mIoU stays as it is."""
    return text if text[1:2].isupper() else text[:1].upper() + text[1:]
