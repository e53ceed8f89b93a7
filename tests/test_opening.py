"""A model with its cache, from options by name."""

import pytest

from gridprune_cli.errors import BadInput
from gridprune_cli.opening import open_pipeline


def test_options_reach_the_pipeline_and_its_cache(tiny_llava, tmp_path, monkeypatch):
    options = {"model": str(tiny_llava), "cache_dir": str(tmp_path / "there"), "cache_limit": "2K", "device": "cpu"}
    pipeline = open_pipeline(options | {"cache_dtype": "int8", "relevance": "words", "dtype": "bfloat16"})
    assert pipeline.model == str(tiny_llava) and pipeline.encoder.cache_dtype == "int8"
    assert (pipeline.store.root, pipeline.store.limit) == (tmp_path / "there", 2048)
    assert pipeline.family.relevance_kind == "words" and str(pipeline.family.dtype) == "torch.bfloat16"
    monkeypatch.setenv("GRIDPRUNE_MODEL", str(tiny_llava))
    pipeline = open_pipeline({"model": None, "no_cache": True, "cache_limit": "2K"})
    assert pipeline.model == str(tiny_llava) and pipeline.store is None
    assert open_pipeline({}).store.root == tmp_path / "cache"  # as the variable says


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"storage": "int8"}, "storage: no setting of a model; there are model, clip, "),
        ({"cache_dtype": "float4"}, "cache_dtype=float4: not one of full, float8, int8"),
        ({"dtype": "float8"}, "dtype.*float8: not one of auto, "),
    ],
)
def test_what_can_not_be_names_its_option(options, line):
    with pytest.raises(BadInput, match=line):
        open_pipeline(options)
