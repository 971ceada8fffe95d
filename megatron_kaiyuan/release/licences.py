"""Licences by the names of the Hub, which are not always those of SPDX."""

__all__ = ["hub_licence"]

_OF_THE_HUB = frozenset(
    [
        "apache-2.0",
        "mit",
        "openrail",
        "bigscience-openrail-m",
        "creativeml-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m",
        "afl-3.0",
        "artistic-2.0",
        "bsl-1.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "c-uda",
        "cc",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "wtfpl",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "etalab-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "agpl-3.0",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "isc",
        "h-research",
        "intel-research",
        "lppl-1.3c",
        "ms-pl",
        "apple-ascl",
        "apple-amlr",
        "mpl-2.0",
        "odc-by",
        "odbl",
        "openrail++",
        "osl-3.0",
        "postgresql",
        "ofl-1.1",
        "ncsa",
        "unlicense",
        "zlib",
        "pddl",
        "lgpl-lr",
        "deepfloyd-if-license",
        "fair-noncommercial-research-license",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "gemma",
    ]
)
"""Of https://huggingface.co/docs/hub/repositories-licenses."""
_OF_SPDX = {
    "odc-by-1.0": "odc-by",
    "odbl-1.0": "odbl",
    "pddl-1.0": "pddl",
    "lgpllr": "lgpl-lr",
    "c-uda-1.0": "c-uda",
    **{f"gfdl-{version}": "gfdl" for version in ("1.1", "1.2", "1.3")},
}
"""Where the two differ; the endings `-only` and `-or-later` are taken off before."""


def hub_licence(named: str) -> str | None:
    """Return the Hub's name of a licence, None where it has none.

    Args:
        named: By SPDX (`Apache-2.0`, `GPL-3.0-or-later`) or the Hub (`apache-2.0`), in any case.
    """
    plain = named.strip().lower()
    if plain.startswith(("gpl", "lgpl", "agpl", "gfdl")):
        plain = plain.removesuffix("-only").removesuffix("-or-later").removesuffix("+")
    found = _OF_SPDX.get(plain, plain)
    return found if found in _OF_THE_HUB else None
