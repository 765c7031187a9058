"""Weights that recipes name: where they are, and under which licence. Nothing is fetched here."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Asset:
    """One published file or folder. sha256 is None where nobody published one: it is recorded at the first load."""

    key: str
    location: str
    licence: str
    sha256: str | None = None

    @property
    def non_commercial(self) -> bool:
        return "NC" in self.licence.split() or "non-commercial" in self.licence


ASSETS = {
    asset.key: asset
    for asset in (
        Asset("ddpm-cifar10-32", "google/ddpm-cifar10-32", "Apache-2.0"),
        Asset("ddpm-ema-celebahq-256", "google/ddpm-ema-celebahq-256", "Apache-2.0"),
    )
}


def find(reference: str) -> Asset | None:
    """The asset with this key or location."""
    return ASSETS.get(reference) or next((a for a in ASSETS.values() if a.location == reference), None)


def looks_like_hub_id(reference: str) -> bool:
    """OWNER/NAME, or a key of :data:`ASSETS`."""
    return reference in ASSETS or re.fullmatch(r"[\w.-]+/[\w.-]+", reference) is not None
