"""A score, and what it is a score of; the two never part."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

PROTOCOLS = {
    "inception": "torch-fidelity's Inception against any reference",
    "inception-val": "torch-fidelity's Inception, 50,000 images, ImageNet's validation images at 256 (MAGE, ADDP)",
    "inception-adm": "torch-fidelity's Inception, 50,000 images, ADM's stored mean and covariance (DiT, RCG, MAR)",
}
ABSENT = {
    "inception-clean": "torch-fidelity does not have the antialiased resize of clean-fid",
    "dinov2": "torch-fidelity would run code from the network, and resizes in another way than its authors",
}
NAMED = "named features"  # the protocol of scores in a classifier's feature space
OF_INCEPTION = ("FID", "IS", "KID")  # names that no score of other features may bear


@dataclass(frozen=True)
class Protocol:
    """What a score is a score of; "unknown" where nobody said."""

    name: str  # a key of PROTOCOLS, or NAMED
    images: int  # N
    reference: str
    reference_hash: str  # of the reference's pixels in any order, or of the statistics file
    reference_images: int | None  # None where only their statistics are there
    features: str  # whose
    resize: str
    files: str = "unknown"  # format of the generated images
    sampler: str = "unknown"
    steps: str = "unknown"
    guidance: str = "unknown"

    def __post_init__(self) -> None:
        if not self.name or not self.reference_hash or self.images < 2:
            raise ValueError("a protocol has a name, a reference hash, and two images at least")


@dataclass(frozen=True, repr=False)
class Score:
    """One number. Its text always tells protocol and N; in no format can the number be had bare.

    spread: standard deviation over splits or subsets, None where there are none. detail: how it was estimated.
    """

    name: str
    value: float
    protocol: Protocol
    spread: float | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.protocol, Protocol):
            raise TypeError(f"{self.name}: a score needs its Protocol")
        if self.protocol.name not in PROTOCOLS and any(word in self.name.split() for word in OF_INCEPTION):
            raise ValueError(f"{self.name}: {', '.join(OF_INCEPTION)} are names of Inception's features alone")

    def __str__(self) -> str:
        p = self.protocol
        against = f"{p.reference_images:,}" if p.reference_images else "statistics"
        spread = f" ± {self.spread:.2g}" if self.spread is not None else ""
        detail = f" ({self.detail})" if self.detail else ""
        where = f"[{p.name}, N = {p.images:,} against {against}, reference {p.reference_hash[:12]}]"
        return f"{self.name} {self.value:.5g}{spread}{detail} {where}"

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        if spec:  # ".3" would cut everything off but the name
            raise TypeError("a score has one text form; its number is .value")
        return str(self)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Scores:
    """The scores of one set, and what has to be said aloud."""

    scores: tuple[Score, ...]
    said: tuple[str, ...]

    def lines(self) -> list[str]:
        """For a terminal."""
        p = self.scores[0].protocol
        about = f"{PROTOCOLS[p.name]}" if p.name in PROTOCOLS else "not FID: comparable within these features alone"
        count = f"{p.reference_images:,} images" if p.reference_images else "statistics alone"
        return [
            *map(str, self.scores),
            f"protocol: {p.name}: {about}",
            f"reference: {p.reference}, {count}, sha256 {p.reference_hash}",
            f"features: {p.features}; resize: {p.resize}",
            f"images: {p.files}, sampler {p.sampler}, steps {p.steps}, guidance {p.guidance}",
            *(f"note: {line}" for line in self.said),
        ]

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {"scores": [score.to_json() for score in self.scores], "said": list(self.said)}
