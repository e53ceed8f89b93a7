"""Which tokens to keep, from options as command lines, files and requests hold them."""

import pytest

from gridprune_cli.errors import BadInput
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.settings import Pruning, parse_pairs


@pytest.mark.parametrize(
    ("options", "pruning"),
    [
        ({}, Pruning()),
        ({"keep": None, "query": None, "region": None}, Pruning()),
        ({"keep": ".25", "tokens": "12"}, Pruning(keep=0.25, tokens=12)),
        ({"keep": 1, "share_budget": "true", "region": "none"}, Pruning(keep=1.0, share_budget=True, region="none")),
        ({"region": "0,1,2,3", "query": "5"}, Pruning(region=(0, 1, 2, 3), query="5")),
        ({"region": [0, 1, 2, 3], "localizer": None}, Pruning(region=(0, 1, 2, 3))),
        ({"ilp": "0.05", "ilp_layer": "2"}, Pruning(ilp=0.05, ilp_layer=2)),
        ({"ilp": "region, 0.05", "ilp_layer": "2,4"}, Pruning(ilp=("region", 0.05), ilp_layer=(2, 4))),
        ({"ilp": [0.3, 0.1], "ilp_layer": [1, 2]}, Pruning(ilp=(0.3, 0.1), ilp_layer=(1, 2))),
        ({"ilp": 0.05, "plc": "pool", "inside_ratio": "2"}, Pruning(ilp=0.05, plc="pool", inside_ratio=2.0)),
        ({"method": "fastv", "layer": "1"}, Pruning(method=make_method("fastv", layer=1))),
        ({"method_option": ["zone=2", "alpha=0.5"]}, Pruning(method=make_method("gridprune", zone=2, alpha=0.5))),
        ({"method": "btp", "method_option": ["layers=3"]}, Pruning(method=make_method("btp", layers="3"))),
        ({"method": "btp", "method_option": ['layers="2,3"']}, Pruning(method=make_method("btp", layers="2,3"))),
        ({"method": "btp", "layers": "3"}, Pruning(method=make_method("btp", layers="3"))),
        ({"method_option": {"zone": 2}, "alpha": 0.5}, Pruning(method=make_method("gridprune", zone=2, alpha=0.5))),
        (
            {"literal": True, "method_option": ["alpha=0.5"]},
            Pruning(
                method=make_method("gridprune", alpha=0.5, temperature=1.0, saliency_scale="none", few="top"),
                region="none",
            ),
        ),
        ({"method": "trim", "region": "none", "literal": False}, Pruning(method=make_method("trim"), region="none")),
    ],
)
def test_options_as_texts_and_as_values(options, pruning):
    assert Pruning.from_options(options) == pruning


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"keep": "x"}, "keep=x: must be a number"),
        ({"keep": True}, "keep=True: must be a number"),
        ({"keep": "9" * 5000}, "keep=inf: must be above 0"),
        ({"tokens": "1.5"}, "tokens=1.5: must be a whole number"),
        ({"tokens": "9" * 5000}, "tokens=999"),
        ({"share_budget": "maybe"}, "share_budget=maybe: must be true or false"),
        ({"query": 5}, "query=5: must be a text"),
        ({"query": ["a"]}, r"query=\['a'\]: must be a text"),
        ({"keep": 10**400}, "keep=1000.*: must be a number"),
        ({"temperature": 10**400}, "method=gridprune: int too large"),
        ({"method_option": 5}, "method_option=5: must be a list of NAME=VALUE, or an object"),
        ({"ilp": True}, "ilp=True: must be a text"),
        ({"kep": 1}, "kep: neither a setting of pruning nor an option of the method gridprune; there are .*zone, "),
        ({"method": "magic"}, "method=magic: unknown method 'magic': choose from gridprune"),
        ({"method": ["fastv"]}, r"method=\['fastv'\]: unknown method"),
        ({"zone": 3, "method_option": ["zone=2"]}, "method_option=zone: given twice, also as `zone`"),
        ({"method_option": ["zone"]}, "method_option=zone: not NAME=VALUE"),
        ({"method": "fastv", "method_option": ["zone=2"]}, "method=fastv: method fastv has no option 'zone'"),
        ({"method": "trim", "region": "auto"}, "region: only for `method=gridprune`, not for trim"),
        ({"method": "trim", "literal": True}, "literal: only for `method=gridprune`, not for trim"),
        ({"literal": True, "region": "auto"}, "region: not with `literal`"),
        ({"localizer": "vlm", "region": "0,0,1,1"}, "localizer=vlm: only for `method=gridprune` with `region=auto`"),
        ({"localizer_template": "{question}"}, "localizer_template: only with a `localizer` that is a model"),
        (
            {"localizer": "vlm", "literal": True},
            "localizer=vlm: only for `method=gridprune` .*, and not `literal`",
        ),
        ({"localizer": "vlm", "method": "trim"}, "localizer=vlm: only for `method=gridprune`"),
        ({"positions": "compact", "method": "vtw"}, "positions=compact: not with `method=vtw`, whose stages say how"),
        ({"plc": "pool", "method": "visionzip"}, "plc=pool: not with `method=visionzip`, which merges"),
        ({"plc": "pool", "method": "trim"}, "plc=pool: not with `method=trim`, which merges"),
        ({"positions": "x"}, "positions=x: not one of original, compact"),
        ({"inside_ratio": "0.5", "plc": "pool"}, "inside_ratio=0.5: must be at least 1"),
    ],
)
def test_what_can_not_be_names_its_setting(options, line):
    with pytest.raises(BadInput, match=f"^{line}"):
        Pruning.from_options(options)


@pytest.mark.parametrize(
    "settings",
    [
        {"localizer": "vlm", "region": "none"},
        {"localizer": "vlm", "region": (0, 0, 3, 3)},
        {"localizer": "vlm", "method": make_method("divprune")},
        {"localizer_template": "{question}"},
    ],
)
def test_a_localizer_needs_a_region_to_find_from_python_too(settings):
    with pytest.raises(BadInput, match=r"^localizer(=vlm: only for|_template: only with)"):
        Pruning(**settings)


def test_pairs():
    assert parse_pairs(["a=1", "b=1"], "method_option", {"b"}) == {"a": 1, "b": "1"}
    assert parse_pairs(["a=1", "b=x=y", "c=[1]", "d="], "generation") == {"a": 1, "b": "x=y", "c": [1], "d": ""}
    no_json = {"a": "NaN", "b": "[-Infinity]", "c": "1e999"}  # nor can any of it be sent to a server
    assert parse_pairs([f"{name}={text}" for name, text in no_json.items()], "generation") == no_json
