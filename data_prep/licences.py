"""Licence names and links, as people write them, to SPDX identifiers; and which of them a corpus may hold.

Identifiers: spdx.org/licenses. A ported Creative Commons licence that SPDX does not list becomes a LicenseRef and keeps
its link. Nothing is guessed: what names no version, or no known licence, is refused with the reason.
"""

import re
from typing import NamedTuple

from ssmttm.errors import UserError

_CC_URL = re.compile(r"creativecommons\.org/licenses/(by(?:-nc|-nd|-sa)*)/(\d\.\d)(?:/([a-z]{2,4}))?(?:[/#?]|$)")
_CC_NAME = re.compile(r"(?:cc|creative commons)[\s:_-]*")
_CC_PARTS = {"by": "by", "attribution": "by", "nc": "nc", "noncommercial": "nc", "nd": "nd", "noderivatives": "nd",
             "noderivs": "nd", "sa": "sa", "sharealike": "sa"}  # fmt: skip
_CC_KINDS = {"by", "by-sa", "by-nd", "by-nc", "by-nc-sa", "by-nc-nd"}
_CC_VERSIONS = {"1.0", "2.0", "2.5", "3.0", "4.0"}
_PORTS = {"2.5": {"by": {"AU"}},
          "2.0": {"by-nc-sa": {"DE", "FR", "UK"}, "by-sa": {"UK"}},
          "2.1": {"by-sa": {"JP"}},
          "3.0": {"by": {"AT", "AU", "DE", "IGO", "NL", "US"}, "by-nc": {"DE"}, "by-nc-nd": {"DE", "IGO"},
                  "by-nc-sa": {"DE", "IGO"}, "by-nd": {"DE"}, "by-sa": {"AT", "DE", "IGO"}}}  # fmt: skip
_FREE_ART = re.compile(r"(?:artlibre\.org|free art licen[cs]e|licence art libre|^lal\b)")


class Licence(NamedTuple):
    """An SPDX identifier and the link to the text."""

    spdx: str
    url: str

    @property
    def non_commercial(self) -> bool:
        return "-NC" in self.spdx

    @property
    def no_derivatives(self) -> bool:
        return "-ND" in self.spdx

    @property
    def share_alike(self) -> bool:
        return "-SA" in self.spdx or self.spdx.startswith("LAL-")

    @property
    def wants_attribution(self) -> bool:
        return "BY" in self.spdx or self.spdx.startswith("LAL-")


POLICIES = {
    "open": "public domain and attribution only",
    "open-sa": "and share-alike",
    "research-nc": "and non-commercial",
    "nd": "and no-derivatives: such segments and codes must not be passed on",
}


def normalise(text: str) -> Licence:
    """The licence that a name, an SPDX identifier or a link stands for.

    Raises:
        UserError: no known licence, or one without its version.
    """
    shown, lowered = text.strip(), " ".join(text.strip().lower().split())
    if not lowered:
        raise UserError("no licence is given")
    if "creativecommons.org/publicdomain/" in lowered or lowered.startswith("cc-pdm"):
        return _public_domain(lowered, shown)
    if re.fullmatch(r"(?:cc[\s-]?0|creative commons zero)(?:[\s-]*v?1(?:\.0)?)?(?: universal)?", lowered):
        return _CC0
    if _FREE_ART.search(lowered):
        return _free_art(lowered, shown)
    found = _CC_URL.search(lowered)
    if found:
        return _creative_commons(_kind(set(found[1].split("-"))), found[2], (found[3] or "").upper(), shown)
    return _from_cc_name(lowered.removeprefix("licenseref-"), shown)


def allowed(licence: Licence, policy: str) -> str | None:
    """Why a policy refuses a licence; None if it does not."""
    rank = list(POLICIES).index(policy)
    needed = 3 if licence.no_derivatives else 2 if licence.non_commercial else 1 if licence.share_alike else 0
    return None if rank >= needed else f"licence {licence.spdx} needs --policy {list(POLICIES)[needed]}"


_CC0 = Licence("CC0-1.0", "https://creativecommons.org/publicdomain/zero/1.0/")


def _public_domain(lowered: str, shown: str) -> Licence:
    if "/zero/1.0" in lowered:
        return _CC0
    if "/mark/1.0" in lowered or lowered == "cc-pdm-1.0":
        return Licence("CC-PDM-1.0", "https://creativecommons.org/publicdomain/mark/1.0/")
    raise _unknown(shown)


def _free_art(lowered: str, shown: str) -> Licence:
    version = re.search(r"\b1[.-]([123])\b", lowered)
    if version is None:
        if "artlibre.org" not in lowered:
            raise UserError(f"licence {shown!r} names no version")
        return Licence("LAL-1.3", "https://artlibre.org/licence/lal/en/")
    return Licence(f"LAL-1.{version[1]}", "https://artlibre.org/licence/lal/en/")


def _from_cc_name(lowered: str, shown: str) -> Licence:
    """Such as "CC BY-NC 4.0", "cc-by-sa-3.0-at" or "Creative Commons Attribution-ShareAlike 3.0 Unported"."""
    start = _CC_NAME.match(lowered)
    if not (start or lowered.startswith("attribution")):
        raise _unknown(shown)
    rest = lowered[start.end() :] if start else lowered
    rest = re.sub(r"non[\s-]+commercial", "noncommercial", re.sub(r"no[\s-]+deriv", "noderiv", rest))
    rest = re.sub(r"share[\s-]+alike", "sharealike", rest)
    version = re.search(r"\b(\d\.\d)\b", rest)
    words = re.findall(r"[a-z]+", rest[: version.start()] if version else rest)
    parts = {_CC_PARTS[word] for word in words if word in _CC_PARTS}
    strange = [word for word in words if word not in _CC_PARTS and word not in ("licence", "license", "v", "version")]
    kind = _kind(parts)
    if strange or kind not in _CC_KINDS:
        raise _unknown(shown)
    if version is None:
        raise UserError(f"licence {shown!r} names no version (such as 4.0)")
    port = re.match(r"[\s-]*([a-z]{2}|igo)\b", rest[version.end() :])
    return _creative_commons(kind, version[1], port[1].upper() if port else "", shown)


def _kind(parts: set[str]) -> str:
    return "-".join(part for part in ("by", "nc", "nd", "sa") if part in parts)


def _creative_commons(kind: str, version: str, port: str, shown: str) -> Licence:
    if kind not in _CC_KINDS or (version not in _CC_VERSIONS and not port):
        raise _unknown(shown)
    port = "" if port == "DEED" else port
    name = f"CC-{kind.upper()}-{version}" + (f"-{port}" if port else "")
    if port and port not in _PORTS.get(version, {}).get(kind, set()):
        name = f"LicenseRef-{name}"
    place = f"{port.lower()}/" if port else ""
    return Licence(name, f"https://creativecommons.org/licenses/{kind}/{version}/{place}")


def _unknown(shown: str) -> UserError:
    return UserError(f"licence {shown!r} is not known: give an SPDX identifier such as CC-BY-4.0, or its link")
