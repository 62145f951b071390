"""Scoring: what counts is what is valid, and weights come back as the network that they were trained as."""

import math

import pytest
import torch

from d3lib.artefacts import save_weights
from d3lib.errors import UserError
from d3lib.evaluation import Closely, as_predictor, evaluate, load_network
from d3lib.models import D3Net

MADE = {"encoder": "tiny", "max_depth": "10.0", "height": "64", "width": "96", "trained_on": "noise", "key": "k"}


def maps(*rows):
    """Images of one row each, (B, 1, 1, n)."""
    return torch.tensor(rows)[:, None, None]


def test_a_closer_look_counts_valid_pixels_alone_and_ranks_by_their_mean():
    close = Closely()
    # of the first frame one pixel counts, wrong by 3 m; of the second all four, by 2 m each: more in all, less in mean
    close(
        maps([5.0, 9.0, 9.0, 9.0], [4.0, 4.0, 4.0, 4.0]),
        maps([2.0, math.nan, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]),
        maps([True, False, False, False], [True, True, True, True]),
    )
    close(maps([2.2, 2.2, 9.0, 2.0]), maps([2.0, 2.0, 0.0, 4.0]), maps([True, True, False, True]))
    assert close.worst(3) == [0, 1, 2] and close.worst(1) == [0]
    found = close.by_scene(["kitchen", "office", "kitchen"])
    assert found["scene"] == ["kitchen", "office"]
    assert found["n"] == [4, 4] and found["d1"] == [2, 0]
    assert found["se"] == pytest.approx([9 + 2 * 0.04 + 4, 16], rel=1e-4)
    assert found["rel"] == pytest.approx([1.5 + 2 * 0.1 + 0.5, 4], rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"skips": False}, {"pooling": "max"}, {"output": "log"}, {"max_depth": 4.0}])
def test_a_network_comes_back_from_its_file_as_it_was(options, tmp_path):
    net = D3Net("tiny", seed=0, **options)
    save_weights(tmp_path / "w.safetensors", net.state_dict(), MADE | {k: str(v) for k, v in options.items()})
    rgb = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    loaded, made = load_network(tmp_path / "w.safetensors")
    expected = as_predictor(net.to(memory_format=torch.channels_last))(rgb)
    assert torch.equal(as_predictor(loaded)(rgb), expected) and made["trained_on"] == "noise"


@pytest.mark.parametrize("max_depth", ["0.0", "-1.0", "nan", "inf"])
def test_weights_whose_range_is_no_range_are_refused(max_depth, tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, D3Net("tiny", seed=0).state_dict(), MADE | {"max_depth": max_depth})
    with pytest.raises(UserError, match="do not fit"):
        load_network(path)


def test_an_empty_set_is_refused_and_not_scored_as_nothing():
    with pytest.raises(UserError, match="the set is empty"):
        evaluate(lambda rgb: rgb[:, :1], [])
