"""Licences: names and links as data sets write them, policies, the strictest of several."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmttm.errors import UserError
from ssmttm.licences import POLICIES, allowed, normalise, strictest, tier

KINDS = ["by", "by-sa", "by-nd", "by-nc", "by-nc-sa", "by-nc-nd"]
ORDER = ["CC0-1.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-2.0-FR", "CC-BY-ND-4.0",
         "CC-BY-NC-ND-3.0"]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "spdx", "url"),
    [
        ("Attribution-NonCommercial-ShareAlike 3.0 International", "CC-BY-NC-SA-3.0", "by-nc-sa/3.0/"),
        ("Attribution-NonCommercial-NoDerivatives (aka Music Sharing) 3.0 International", "CC-BY-NC-ND-3.0",
         "by-nc-nd/3.0/"),
        ("Creative Commons Attribution-NonCommercial-NoDerivatives (aka Music Sharing) 3.0 International",
         "CC-BY-NC-ND-3.0", "by-nc-nd/3.0/"),
        ("Attribution-Noncommercial-No Derivative Works 3.0 United States", "LicenseRef-CC-BY-NC-ND-3.0-US",
         "by-nc-nd/3.0/us/"),
        ("Attribution 3.0 United States", "CC-BY-3.0-US", "by/3.0/us/"),
        ("Attribution-Noncommercial-Share Alike 2.0 Germany", "CC-BY-NC-SA-2.0-DE", "by-nc-sa/2.0/de/"),
        ("Attribution-Noncommercial 2.0 UK: England", "LicenseRef-CC-BY-NC-2.0-UK", "by-nc/2.0/uk/"),
        ("Attribution-Noncommercial-Share Alike 2.5 UK: Scotland", "LicenseRef-CC-BY-NC-SA-2.5-SCOTLAND",
         "by-nc-sa/2.5/scotland/"),
        ("http://creativecommons.org/licenses/by-nc-sa/2.5/scotland/", "LicenseRef-CC-BY-NC-SA-2.5-SCOTLAND",
         "by-nc-sa/2.5/scotland/"),
        ("https://www.creativecommons.org/licenses/by-sa/2.0/uk/legalcode", "CC-BY-SA-2.0-UK", "by-sa/2.0/uk/"),
        ("http://creativecommons.org/licenses/by-nd-nc/1.0/", "CC-BY-NC-ND-1.0", "by-nd-nc/1.0/"),
        ("creativecommons.org/licenses/by/4.0", "CC-BY-4.0", "by/4.0/"),
        ("https://creativecommons.org/licenses/by/4.0/deed.fr", "CC-BY-4.0", "by/4.0/"),
        ("https://creativecommons.org/licenses/by/3.0/igo/legalcode.en", "CC-BY-3.0-IGO", "by/3.0/igo/"),
        ("http://creativecommons.org/licenses/publicdomain/", "CC-PDDC", "licenses/publicdomain/"),
        ("Public Domain Mark 1.0", "CC-PDM-1.0", "publicdomain/mark/1.0/"),
        ("CC0 1.0 Universal (CC0 1.0) Public Domain Dedication", "CC0-1.0", "publicdomain/zero/1.0/"),
        ("Creative Commons Attribution 3.0 Unported (CC BY 3.0)", "CC-BY-3.0", "by/3.0/"),
        ("CC-BY-SA-2.1-JP", "CC-BY-SA-2.1-JP", "by-sa/2.1/jp/"),
        ("http://artlibre.org/licence/lal/en", "LAL-1.3", "artlibre.org/licence/lal/en/"),
    ],
)  # fmt: skip
def test_normalise_names_and_links_of_data_sets(text, spdx, url):
    licence = normalise(text)
    assert licence.spdx == spdx
    assert licence.url.startswith("https://") and licence.url.endswith(url)


@pytest.mark.parametrize(
    "text",
    [
        "FMA-Limited: Download Only", "Free Art License", "Noncommercial Sampling Plus", "Public Domain",
        "CC-BY-4.0 AND CC-BY-NC-4.0", "CC-BY-SA-3.0 OR GPL-3.0", "CC BY 4.0, CC BY-NC 4.0",
        "http://creativecommons.org/licenses/by/4.0/ http://creativecommons.org/licenses/by-nc/4.0/",
        "CC-BY-9.9-US", "CC-BY-4.0-US", "Attribution 3.0 Atlantis", "CC BY 4.0 but not for robots",
        "http://creativecommons.org/licenses/by/3.0/xx/", "http://creativecommons.org/licenses/sampling+/1.0/",
    ],
)  # fmt: skip
def test_normalise_rejects_ambiguous_or_unknown_licences(text):
    with pytest.raises(UserError, match=re.escape(text)):
        normalise(text)


@pytest.mark.parametrize("text", ["GPL-2.0-or-later", "MIT", "Apache-2.0", "ODbL-1.0", "BSD-3-Clause"])
def test_normalise_says_which_licences_are_admitted(text):
    with pytest.raises(UserError, match=r"not admitted, as it is not made for audio: admitted are CC0-1\.0"):
        normalise(text)


@given(
    st.sampled_from(KINDS),
    st.sampled_from(["1.0", "2.0", "2.5", "3.0", "4.0"]),
    st.sampled_from(["", "fr", "us", "uk", "de", "igo", "jp", "scotland"]),
    st.sampled_from(["http://", "https://www.", "HTTPS://", ""]),
    st.sampled_from(["/", "", "/deed.en", "/legalcode", "#foo"]),
)
def test_normalise_is_idempotent_for_identifier_and_link(kind, version, port, scheme, end):
    ported = f"/{port}" if port and version != "4.0" else ""
    licence = normalise(f"{scheme}creativecommons.org/licenses/{kind}/{version}{ported}{end}")
    assert normalise(licence.spdx) == licence == normalise(licence.url)
    assert kind.upper() in licence.spdx and version in licence.spdx and ported.strip("/").upper() in licence.spdx


@given(st.text(max_size=60) | st.lists(st.sampled_from(
    ["cc", "by", "-", " ", "nc", "4.0", "3.0", "(", ")", "attribution", "creativecommons.org/licenses/", "/", "lal",
     "us", "and", "1.3", "zero", "publicdomain"]), max_size=12).map("".join))  # fmt: skip
def test_normalise_gives_a_licence_or_a_user_error_for_any_text(text):
    try:
        licence = normalise(text)
    except UserError as error:
        assert "licence" in str(error)
        return
    assert normalise(licence.spdx) == licence == normalise(licence.url)


def test_tier_is_the_narrowest_policy_that_allows_a_licence():
    assert [tier(spdx) for spdx in ORDER] == ["open", "open", "open-sa", "research-nc", "research-nc", "nd", "nd"]
    assert tier("LAL-1.3") == "open-sa" and tier("CC-PDM-1.0") == tier("CC-PDDC") == "open"
    for spdx in ORDER:
        allowing = [policy for policy in POLICIES if allowed(normalise(spdx), policy) is None]
        assert allowing == list(POLICIES)[list(POLICIES).index(tier(spdx)) :]


@given(st.lists(st.sampled_from(ORDER), min_size=1))
def test_strictest_licence_is_the_maximum(licences):
    assert strictest(licences) == max(licences, key=ORDER.index)


def test_strictest_of_equals_unknown_and_none():
    assert strictest(["CC-BY-SA-4.0", "CC-BY-SA-3.0"]) == "CC-BY-SA-4.0"
    assert strictest(["LAL-1.3", "CC-BY-4.0"]) == "LAL-1.3"
    assert strictest(["CC-BY-NC-ND-4.0", "NOASSERTION", "CC0-1.0"]) == "NOASSERTION"
    with pytest.raises(UserError):
        strictest([])
