"""The compressor beside a checkpoint: what it starts as, what it looks at, and how it is read."""

import pytest
import torch

from gridprune_cli.errors import GridpruneError
from gridprune_cli.vlm.compressor import FILE, HEAD, QUERIES, Compressor, load_compressor, save_compressor

WIDTH = 2 * HEAD


def inputs(batch=2, count=30, rows=24, seed=0):
    """states, relevance, within, pooled, inside: rows beyond the queries, so that these are used again."""
    generator = torch.Generator().manual_seed(seed)
    within = torch.rand(batch, count, generator=generator) < 0.4
    kept = torch.rand(batch, count, generator=generator).topk(rows, dim=1).indices.sort(1).values
    vision_features = torch.randn(batch, count, WIDTH, generator=generator)
    relevance = torch.rand(batch, count, generator=generator) * 2 - 1
    pooled = torch.randn(batch, rows, WIDTH, generator=generator)
    return vision_features, relevance, within, pooled, within.gather(1, kept)


@pytest.fixture
def trained():
    """Random weights throughout: none of them is zero any more."""
    torch.manual_seed(0)
    compressor = Compressor(WIDTH).eval()
    for parameter in compressor.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    return compressor


def test_untrained_it_gives_back_what_pooling_gave():
    arguments = inputs()
    assert torch.equal(Compressor(WIDTH)(*arguments), arguments[3])


@torch.no_grad()
def test_a_row_looks_at_its_own_side_alone(trained):
    vision_features, relevance, within, pooled, inside = inputs()
    before = trained(vision_features, relevance, within, pooled, inside)
    for side in (True, False):
        changed = torch.where(
            (within == side)[..., None], vision_features + 1.5 * torch.randn_like(vision_features), vision_features
        )
        after = trained(changed, relevance, within, pooled, inside)
        moved = (after - before).abs().amax(-1) > 1e-4
        assert torch.equal(moved, inside == side)
    assert not torch.allclose(trained(vision_features, -relevance, within, pooled, inside), before)


@torch.no_grad()
def test_it_is_attention_written_out(trained):
    vision_features, relevance, within, pooled, inside = inputs(batch=1)
    features = trained(vision_features, relevance, within, pooled, inside)[0]
    heads, outside = 2, 0
    tokens = torch.cat([trained.norm_tokens(vision_features[0]), 10 * relevance[0][:, None]], 1)
    projected = trained.tell(tokens)
    for j in range(pooled.shape[1]):
        asked = trained.ask(trained.norm_rows(pooled[0, j]))
        if not inside[0, j]:
            asked = asked + trained.queries[outside % QUERIES]
            outside += 1
        members = (within[0] == inside[0, j]).nonzero()[:, 0]
        parts = []
        for h in range(heads):
            cut = slice(h * WIDTH // heads, (h + 1) * WIDTH // heads)
            key, value = projected[members][:, :WIDTH][:, cut], projected[members][:, WIDTH:][:, cut]
            parts.append((key @ asked[cut] * (WIDTH // heads) ** -0.5).softmax(0) @ value)
        row = pooled[0, j] + trained.out(torch.cat(parts))
        row = row + trained.narrow(torch.nn.functional.gelu(trained.wide(trained.norm_out(row))))
        assert torch.allclose(features[j], row, atol=1e-4)


def test_it_comes_back_from_disk_in_16_bit(trained, tmp_path):
    save_compressor(trained, tmp_path)
    again = load_compressor(tmp_path)
    for (name, saved), loaded in zip(trained.state_dict().items(), again.state_dict().values(), strict=True):
        assert loaded.dtype == torch.float32 and torch.equal(saved.bfloat16().float(), loaded), name


@pytest.mark.parametrize("spoil", ["cut", "renamed", "flat"])
def test_a_broken_one_is_named_in_one_line(trained, tmp_path, spoil):
    from safetensors.torch import load_file, save_file

    save_compressor(trained, tmp_path)
    path = tmp_path / FILE
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif spoil == "flat":
        save_file({name: weight.flatten() for name, weight in load_file(path).items()}, path)
    else:
        save_file({f"{name}x": weight for name, weight in load_file(path).items()}, path)
    with pytest.raises(GridpruneError, match=r"compressor/model\.safetensors: can't be loaded") as caught:
        load_compressor(tmp_path)
    assert "\n" not in str(caught.value)
