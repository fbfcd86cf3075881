"""SPDX identifiers of licence names and links, and policies on which licences a corpus may contain.

Identifiers: spdx.org/licenses. A ported Creative Commons licence that SPDX does not list becomes a LicenseRef and keeps
its link. A name without a version, with several licences or with an unknown one is an error.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from ssmttm.errors import UserError

_CC_URL = re.compile(r"creativecommons\.org/licenses/(by(?:-nc|-nd|-sa)*)/(\d\.\d)(?:/([a-z]{2,8}))?(?:[/#?]|$)")
_CC_NAME = re.compile(r"(?:cc|creative commons)[\s:_-]*")
_CC_PARTS = {"by": "by", "attribution": "by", "nc": "nc", "noncommercial": "nc", "nd": "nd", "noderivatives": "nd",
             "noderivs": "nd", "noderivative": "nd", "sa": "sa", "sharealike": "sa"}  # fmt: skip
_CC_KINDS = {"by", "by-sa", "by-nd", "by-nc", "by-nc-sa", "by-nc-nd"}
_CC_VERSIONS = {"1.0", "2.0", "2.5", "3.0", "4.0"}
_PORTED_VERSIONS = {"1.0", "2.0", "2.1", "2.5", "3.0"}
_FILLING = {"licence", "license", "v", "version", "works", "international", "unported", "generic", "universal", "deed"}
_COUNTRIES = {
    "argentina": "ar", "australia": "au", "austria": "at", "belgium": "be", "brazil": "br", "bulgaria": "bg",
    "canada": "ca", "chile": "cl", "china mainland": "cn", "colombia": "co", "costa rica": "cr", "croatia": "hr",
    "czech republic": "cz", "denmark": "dk", "ecuador": "ec", "egypt": "eg", "estonia": "ee", "finland": "fi",
    "france": "fr", "germany": "de", "greece": "gr", "guatemala": "gt", "hong kong": "hk", "hungary": "hu",
    "igo": "igo", "india": "in", "ireland": "ie", "israel": "il", "italy": "it", "japan": "jp", "luxembourg": "lu",
    "macedonia": "mk", "malaysia": "my", "malta": "mt", "mexico": "mx", "netherlands": "nl", "new zealand": "nz",
    "norway": "no", "peru": "pe", "philippines": "ph", "poland": "pl", "portugal": "pt", "puerto rico": "pr",
    "romania": "ro", "serbia": "rs", "singapore": "sg", "slovenia": "si", "south africa": "za", "south korea": "kr",
    "korea": "kr", "spain": "es", "sweden": "se", "switzerland": "ch", "taiwan": "tw", "thailand": "th",
    "uganda": "ug", "uk england wales": "uk", "uk england and wales": "uk", "uk england": "uk",
    "uk scotland": "scotland", "united states": "us", "usa": "us", "venezuela": "ve", "vietnam": "vn",
}  # fmt: skip
_CODES = {*_COUNTRIES.values()}
_PORTS = {"2.5": {"by": {"AU"}},
          "2.0": {"by-nc-sa": {"DE", "FR", "UK"}, "by-sa": {"UK"}},
          "2.1": {"by-sa": {"JP"}},
          "3.0": {"by": {"AT", "AU", "DE", "IGO", "NL", "US"}, "by-nc": {"DE"}, "by-nc-nd": {"DE", "IGO"},
                  "by-nc-sa": {"DE", "IGO"}, "by-nd": {"DE"}, "by-sa": {"AT", "DE", "IGO"}}}  # fmt: skip
_CC0 = re.compile(r"(?:cc[\s-]?0|creative commons (?:cc[\s-]?0|zero))(?:[\s-]*v?1(?:\.0)?)?(?: universal)?"
                  r"(?: public domain dedication)?")  # fmt: skip
_PUBLIC_DOMAIN_MARK = re.compile(r"(?:cc-pdm-1\.0|(?:cc |creative commons )?public domain mark 1\.0)(?: universal)?")
_OTHER_SPDX = re.compile(
    r"(?:[al]?gpl|gfdl|mit|apache|bsd|mpl|epl|eupl|cddl|isc|zlib|unlicense|wtfpl|odbl|odc-by|ofl|artistic|bsl|0bsd)\b",
    re.IGNORECASE,
)
_ADMITTED = ("admitted are CC0-1.0, CC-PDM-1.0, CC-PDDC, LAL-1.1 to 1.3, and CC-BY, CC-BY-SA, CC-BY-NC, CC-BY-NC-SA, "
             "CC-BY-ND and CC-BY-NC-ND with a version such as CC-BY-4.0, by SPDX identifier or link")  # fmt: skip
_FREE_ART = re.compile(r"(?:artlibre\.org|free art licen[cs]e|licence art libre|^lal\b)")


class Licence(NamedTuple):
    """An SPDX identifier and the link to its text."""

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
    "nd": "and no-derivatives: segments and codes must not be redistributed",
}


def normalise(text: str) -> Licence:
    """The licence of a name, SPDX identifier or link. Raises UserError if unknown, ambiguous or without version."""
    shown, lowered = text.strip(), " ".join(text.strip().lower().split())
    if not lowered:
        raise UserError("the licence is empty")
    if len(set(_CC_URL.findall(lowered))) > 1 or re.search(r"\b(?:and|or|with)\b.*\b(?:cc|gpl|gfdl|mit)\b", lowered):
        raise UserError(f"licence {shown!r} names several licences: give the one that applies")
    plain = " ".join(re.sub(r"\([^()]*\)", " ", lowered).split())
    if _CC0.fullmatch(plain) or "creativecommons.org/publicdomain/zero/1.0" in lowered:
        return Licence("CC0-1.0", "https://creativecommons.org/publicdomain/zero/1.0/")
    if _PUBLIC_DOMAIN_MARK.fullmatch(plain) or "creativecommons.org/publicdomain/mark/1.0" in lowered:
        return Licence("CC-PDM-1.0", "https://creativecommons.org/publicdomain/mark/1.0/")
    if plain == "cc-pddc" or re.search(r"creativecommons\.org/licenses/publicdomain(?:[/#?]|$)", lowered):
        return Licence("CC-PDDC", "https://creativecommons.org/licenses/publicdomain/")
    if _FREE_ART.search(lowered):
        return _free_art(lowered, shown)
    found = _CC_URL.search(lowered)
    if found:
        return _creative_commons(_kind(set(found[1].split("-"))), found[2], found[3] or "", shown)
    return _from_cc_name(plain.removeprefix("licenseref-"), shown)


def allowed(licence: Licence, policy: str) -> str | None:
    """The reason why a policy rejects a licence; None if it allows it."""
    needed = _tier(licence)
    return None if _rank(policy) >= _rank(needed) else f"licence {licence.spdx} needs --policy {needed}"


def tier(licence: str) -> str:
    """The narrowest of POLICIES that allows a licence. Raises UserError as `normalise`."""
    return _tier(normalise(licence))


def strictest(licences: Iterable[str]) -> str:
    """The SPDX identifier of the strictest of some licences, for model cards; not legal advice.

    The order is public domain, attribution, share-alike, non-commercial, both, no-derivatives, non-commercial
    no-derivatives, unknown (such as NOASSERTION). Of equally strict licences, the last by name is returned.
    """
    ranked = [(_strictness(licence), licence) for licence in licences]
    if not ranked:
        raise UserError("no licences to compare")
    return max(ranked)[1]


def _tier(licence: Licence) -> str:
    conditions = (licence.share_alike, licence.non_commercial, licence.no_derivatives)
    return list(POLICIES)[max((rank for rank, holds in enumerate(conditions, 1) if holds), default=0)]


def _strictness(spdx: str) -> tuple[bool, ...]:
    try:
        licence = normalise(spdx)
    except UserError:
        return (True,) * 5
    return False, licence.no_derivatives, licence.non_commercial, licence.share_alike, licence.wants_attribution


def _rank(policy: str) -> int:
    return list(POLICIES).index(policy)


def _free_art(lowered: str, shown: str) -> Licence:
    version = re.search(r"\b1[.-]([123])\b", lowered)
    if version is None and "artlibre.org" not in lowered:
        raise UserError(f"licence {shown!r} names no version")
    return Licence(f"LAL-1.{version[1] if version else 3}", "https://artlibre.org/licence/lal/en/")


def _from_cc_name(lowered: str, shown: str) -> Licence:
    """Such as "CC BY-NC 4.0", "cc-by-sa-3.0-at" or "Creative Commons Attribution-ShareAlike 3.0 Unported"."""
    start = _CC_NAME.match(lowered)
    if not (start or lowered.startswith("attribution")):
        raise _unknown(shown)
    rest = lowered[start.end() :] if start else lowered
    rest = re.sub(r"non[\s-]+commercial", "noncommercial", re.sub(r"no[\s-]+deriv", "noderiv", rest))
    rest = re.sub(r"share[\s-]+alike", "sharealike", rest)
    version = re.search(r"\b\d\.\d\b", rest)
    words = _words(rest[: version.start()] if version else rest)
    kind = _kind({_CC_PARTS[word] for word in words if word in _CC_PARTS})
    if kind not in _CC_KINDS or any(word not in _CC_PARTS for word in words):
        raise _unknown(shown)
    if version is None:
        raise UserError(f"licence {shown!r} names no version (such as 4.0)")
    place = " ".join(_words(rest[version.end() :]))
    return _creative_commons(kind, version[0], _COUNTRIES.get(place, place), shown)


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"[^\W_]+", text) if word not in _FILLING]


def _kind(parts: set[str]) -> str:
    return "-".join(part for part in ("by", "nc", "nd", "sa") if part in parts)


def _creative_commons(kind: str, version: str, port: str, shown: str) -> Licence:
    """`port`: the country in the link, in lower case, or ""."""
    port = "" if port == "deed" else port
    versions = _PORTED_VERSIONS if port else _CC_VERSIONS
    if kind not in _CC_KINDS or version not in versions or (port and port not in _CODES):
        raise _unknown(shown)
    name = f"CC-{kind.upper()}-{version}" + (f"-{port.upper()}" if port else "")
    if port and port.upper() not in _PORTS.get(version, {}).get(kind, set()):
        name = f"LicenseRef-{name}"
    part = "by-nd-nc" if (kind, version) == ("by-nc-nd", "1.0") else kind
    return Licence(name, f"https://creativecommons.org/licenses/{part}/{version}/{f'{port}/' if port else ''}")


def _unknown(shown: str) -> UserError:
    if _OTHER_SPDX.match(shown):
        return UserError(f"licence {shown!r} is not admitted, as it is not made for audio: {_ADMITTED}")
    return UserError(f"licence {shown!r} is not known: {_ADMITTED}")
