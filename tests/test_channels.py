"""group_channels: which channel goes where, and what it refuses."""

import pytest
import torch

from sfr_ext import group_channels


def test_groups_are_consecutive_blocks():
    deep = torch.arange(2 * 6 * 2 * 1, dtype=torch.float32).reshape(2, 6, 2, 1)
    grouped = group_channels(deep, 2)
    assert grouped.shape == (2, 3, 2, 2, 1)
    for group in range(3):
        assert torch.equal(grouped[:, group], deep[:, 2 * group : 2 * group + 2])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_is_a_view(memory_format):
    deep = torch.rand(2, 8, 3, 3).to(memory_format=memory_format)
    assert group_channels(deep, 4).data_ptr() == deep.data_ptr()


def test_one_group_and_empty_batch():
    assert group_channels(torch.zeros(2, 4, 3, 3), 4).shape == (2, 1, 4, 3, 3)
    assert group_channels(torch.zeros(0, 4, 3, 3), 2).shape == (0, 2, 2, 3, 3)


@pytest.mark.parametrize("num_channels", [0, -2, 3, 5, 8])
def test_channels_must_divide(num_channels):
    with pytest.raises(ValueError, match=rf"num_channels = {num_channels} and deep of shape \[1, 4, 2, 2\]"):
        group_channels(torch.zeros(1, 4, 2, 2), num_channels)


def test_wrong_rank_and_kinds():
    with pytest.raises(ValueError, match=r"expected deep of shape \[B, C, H, W\], got \[2, 4\]"):
        group_channels(torch.zeros(2, 4), 2)
    with pytest.raises(ValueError, match=r"got \[4, 2, 2\]; for one map, give deep\[None\]$"):
        group_channels(torch.zeros(4, 2, 2), 2)
    with pytest.raises(TypeError, match="expected deep to be a Tensor, got list"):
        group_channels([1.0], 2)
    with pytest.raises(TypeError, match="expected num_channels to be an int, got float"):
        group_channels(torch.zeros(1, 4, 2, 2), 2.0)
